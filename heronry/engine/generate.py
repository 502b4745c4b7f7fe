"""Prompts in, tokens out: prefill and decode for many sequences at once.

- prompts of any lengths are read in calls of a bounded number of tokens
- what a sequence gets is, to the bit, what it gets alone: see call_sizes.py
- decoding runs one step for all unfinished sequences together: see decode_batch.py
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from .call_sizes import CallSizes, choose_call_sizes
from .completion import FinishReason
from .constraints import Matcher
from .decode_batch import DecodeBatch, Event, SequenceDecoder
from .sampling import Mask, Sampling


class Result(NamedTuple):
    """What one sequence of a `Generation` ended as."""

    tokens: list[int]
    state: State | None  # one row, after the prompt and all of `tokens`; None if the sequence was dropped
    finish_reason: FinishReason | None  # None if it was dropped


class Generation:
    """Iterate over it once for the events, in steps: each step yields one event for every running sequence, or
    several where a grammar forces tokens."""

    def __init__(
        self,
        model: Model,
        logits: Tensor,
        state: State,
        samplings: Sampling | Sequence[Sampling],
        max_tokens: int,
        stop_ids: Collection[int] = (),
        *,
        min_tokens: int = 0,
        top_logprobs: int | None = None,
        masks: Sequence[Mask | None] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        decode: Callable[[int], str] | None = None,
        earlier: Sequence[int] = (),
        matcher: Matcher | None = None,
    ):
        """Decodes from what `prefill` returned.

        Args:
            logits: [S, V], after each prompt.
            state: of S rows.
            samplings: one for all, or one a sequence.
            max_tokens: handed out a sequence at most.
            stop_ids: drawing one of them ends the sequence.
            min_tokens: no stop id is drawn before so many tokens were.
            top_logprobs: log-probabilities of each token and of so many of the most likely ones; None = of none.
            masks: one a sequence; see `Mask`.
            prompts: the token ids of each, for `repetition_penalty`.
            decode: the text of a token, for `penalize_digits=False`.
            earlier: what the model wrote before, at the end of each prompt, as the penalties count it.
            matcher: what each sequence follows, with a copy of its own.
        """
        count = len(logits)
        samplings = [samplings] * count if isinstance(samplings, Sampling) else list(samplings)
        if len(samplings) != count:
            raise InputError(f"{len(samplings)} samplings were given for {count} sequences")
        self._sequences = [
            SequenceDecoder(
                sampling,
                max_tokens,
                frozenset(stop_ids),
                min_tokens,
                top_logprobs,
                masks[i] if masks else None,
                prompts[i] if prompts else (),
                decode,
                earlier,
                matcher.copy() if matcher else None,
            )
            for i, sampling in enumerate(samplings)
        ]
        sizes = choose_call_sizes(model)
        self._batches: list[DecodeBatch] = []
        for first in range(0, count, sizes.rows):
            part = range(first, min(first + sizes.rows, count))
            batch = DecodeBatch(model, sizes)
            rows = state if len(part) == count else state[part]
            batch.add({i: self._sequences[i] for i in part}, logits[part.start : part.stop], rows)
            self._batches.append(batch)
        self._dropped: set[int] = set()

    def drop(self, index: int) -> None:
        """Stop a sequence early; no further event of it comes."""
        self._dropped.add(index)
        for batch in self._batches:
            batch.drop(index)

    def __iter__(self) -> Iterator[Event]:
        while any(map(len, self._batches)):
            for batch in self._batches:
                for event in batch.step():
                    if event.index in self._dropped:
                        continue
                    if event.error is not None:
                        raise event.error
                    yield event

    def run(self) -> list[Result]:
        """Run to the end: one Result a sequence."""
        results = [Result([], None, None) for _ in self._sequences]
        for event in self:
            tokens = results[event.index].tokens
            if event.token is None:
                results[event.index] = Result(tokens, event.state, event.finish_reason)
            else:
                tokens.append(event.token)
        return results


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samplings: Sampling | Sequence[Sampling],
    max_tokens: int,
    stop_ids: Collection[int] = (),
    state: State | None = None,
) -> Generation:
    """Reads the prompts, then decodes; see `prefill` and `Generation`. Each sequence's tokens are those that its
    prompt and sampling give alone."""
    logits, state = prefill(model, prompts, state)
    return Generation(model, logits, state, samplings, max_tokens, stop_ids, prompts=prompts)


@torch.inference_mode()
def prefill(
    model: Model,
    prompts: Sequence[Sequence[int]],
    state: State | None = None,
    progress: Callable[[int, int], object] | None = None,
    on_outputs: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, State]:
    """Reads token ids: the logits [S, V] after the last token of each prompt, and the state of S rows.

    Args:
        state: what each prompt continues, one row a prompt; None = nothing.
        progress: called after every model call with (tokens read, tokens in all).
        on_outputs: called with the number of a prompt and the model's outputs [T, V] for its next T tokens; without it
            only those for the last tokens are computed.

    Raises:
        InputError: no prompts, an empty prompt, a state that does not fit.
    """
    check_prompts(prompts, state)
    device = model.device
    rows = [model.initial_state() if state is None else state[i] for i in range(len(prompts))]
    logits: list[Tensor] = []  # a prompt's last part is never before that of the prompt in front of it
    total, done = sum(map(len, prompts)), 0
    sizes = choose_call_sizes(model)
    for pack in _packs([len(prompt) for prompt in prompts], sizes):
        ids: list[int] = []
        cu = [0]
        for i, start, end in pack:
            ids.extend(prompts[i][start:end])
            cu.append(len(ids))
        before = State.stack([rows[i] for i, _, _ in pack])
        only_last = on_outputs is None
        packed = tuple(cu) if sizes.shared else None  # alone, the model may choose by their number how to read them
        outputs, after = model(torch.tensor([ids], device=device), before, cu_seqlens=packed, last_only=only_last)
        for row, (i, _, end) in enumerate(pack):
            rows[i] = after[row]
            own = outputs[0, row : row + 1] if only_last else outputs[0, cu[row] : cu[row + 1]]
            if on_outputs is not None:
                on_outputs(i, own)
            if end == len(prompts[i]):
                logits.append(own[-1])
        done += len(ids)
        if progress is not None:
            progress(done, total)
    return torch.stack(logits), State.stack(rows)


def check_prompts(prompts: Sequence[Sequence[int]], state: State | None) -> None:
    """InputError unless there are prompts, none of them empty, and a row of the state for each."""
    if not prompts:
        raise InputError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {i} is empty" if len(prompts) > 1 else "the prompt is empty"
            hint = "" if state is None else ": give at least one token, a state alone does not say what comes next"
            raise InputError(which + hint)
    if state is not None and len(state) != len(prompts):
        raise InputError(f"a state of {len(state)} sequences was given for {len(prompts)} prompts")


def _packs(lengths: Sequence[int], sizes: CallSizes) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts prompts into calls: lists of (prompt, start, end), in order."""
    pack: list[tuple[int, int, int]] = []
    room = sizes.tokens
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            end = sizes.next_cut(start, length)
            if pack and (end - start > room or not sizes.shared):
                yield pack
                pack, room = [], sizes.tokens
            pack.append((i, start, end))
            room -= end - start
            start = end
    if pack:
        yield pack
