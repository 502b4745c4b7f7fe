"""Prompts in, tokens out: prefill and decode for many sequences at once.

- prompts of any lengths are read packed in one row, a bounded number of tokens a call
- decoding runs one step for all unfinished sequences as a batch [B, 1]; finished rows leave it
- a token is handed out once the model has read it, so the state beside it covers everything handed out so far:
  generation that is stopped here, for whatever reason, can continue from that state without reading anything again
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from .completion import FinishReason, TokenLogprob
from .sampling import Mask, Sampler, Sampling

CHUNK = 512  # tokens a prefill call: enough for the matrix products, little enough memory


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one sequence, or its end.

    index: which sequence.
    token: None at the end; an end-of-text id is not handed out.
    finish_reason: None before the end.
    logprob: of the token, where it was asked for.
    batch: the state of all sequences that are running; `state` is this one's.
    """

    index: int
    token: int | None
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None
    batch: State
    row: int

    @property
    def state(self) -> State:
        """One row: the state after the prompt and every token handed out so far, this one included."""
        return self.batch if len(self.batch) == 1 else self.batch[self.row]


class Result(NamedTuple):
    """What one sequence of a `Generation` ended as."""

    tokens: list[int]
    state: State | None  # one row, after the prompt and all of `tokens`; None if the sequence was dropped
    finish_reason: FinishReason | None  # None if it was dropped


class Generation:
    """Iterate over it once for the events, in steps: each step yields one event for every running sequence."""

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
        """
        count = len(logits)
        samplings = [samplings] * count if isinstance(samplings, Sampling) else list(samplings)
        if len(samplings) != count:
            raise InputError(f"{len(samplings)} samplings were given for {count} sequences")
        self._model = model
        self._logits = logits
        self._state = state
        self._samplers = [
            Sampler(sampling, prompts[i] if prompts else (), decode, earlier) for i, sampling in enumerate(samplings)
        ]
        self._masks = masks
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._top_logprobs = top_logprobs
        self._stop_ids = frozenset(stop_ids)
        self._dropped: set[int] = set()
        self._drawn: list[list[int]] = [[] for _ in samplings]

    def drop(self, index: int) -> None:
        """Stop a sequence early; no further event of it comes."""
        self._dropped.add(index)

    def _pick(self, index: int, logits: Tensor, step: int) -> tuple[int, TokenLogprob | None]:
        """The next token of a sequence from its logits [V]."""
        mask = self._masks and self._masks[index]
        allowed = mask(list(self._drawn[index])) if mask else None  # a copy: the caller may keep it
        banned = self._stop_ids if step < self._min_tokens else ()
        token = self._samplers[index].pick(logits, allowed, banned)
        if self._top_logprobs is None:
            return token, None
        return token, logprob_of(token, logits, self._top_logprobs)

    def __iter__(self) -> Iterator[Event]:
        logits, state = self._logits, self._state
        running = list(range(len(logits)))
        for step in range(self._max_tokens):
            drawn: list[tuple[int, TokenLogprob | None]] = []
            rows: list[int] = []
            for row, i in enumerate(running):
                if i in self._dropped:
                    continue
                token, logprob = self._pick(i, logits[row], step)
                if token in self._stop_ids:
                    yield Event(i, None, "stop", None, state, row)
                else:
                    rows.append(row)
                    drawn.append((token, logprob))
                    self._drawn[i].append(token)
            if not rows:
                return
            if len(rows) < len(running):
                running = [running[row] for row in rows]
                state = state[rows]
            with torch.inference_mode():
                ids = torch.tensor([token for token, _ in drawn], device=logits.device)[:, None]  # [B, 1]
                logits, state = self._model(ids, state)
                logits = logits[:, -1]
            for row, i in enumerate(running):
                if i not in self._dropped:
                    yield Event(i, drawn[row][0], None, drawn[row][1], state, row)
        for row, i in enumerate(running):
            if i not in self._dropped:
                yield Event(i, None, "length", None, state, row)

    def run(self) -> list[Result]:
        """Run to the end: one Result a sequence."""
        results = [Result([], None, None) for _ in self._samplers]
        for event in self:
            tokens = results[event.index].tokens
            if event.token is None:
                results[event.index] = Result(tokens, event.state, event.finish_reason)
            else:
                tokens.append(event.token)
        return results


def logprob_of(token: int, logits: Tensor, top: int) -> TokenLogprob:
    """The log-probability of a token under logits [V], and those of the `top` most likely ones."""
    logprobs = torch.log_softmax(logits.detach().to("cpu", torch.float32), 0)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    samplings: Sampling | Sequence[Sampling],
    max_tokens: int,
    stop_ids: Collection[int] = (),
    state: State | None = None,
    chunk: int = CHUNK,
) -> Generation:
    """Reads the prompts, then decodes; see `prefill` and `Generation`. Each sequence's tokens are those that its
    prompt and sampling give alone."""
    logits, state = prefill(model, prompts, state, chunk)
    return Generation(model, logits, state, samplings, max_tokens, stop_ids, prompts=prompts)


@torch.inference_mode()
def prefill(
    model: Model,
    prompts: Sequence[Sequence[int]],
    state: State | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Tensor, State]:
    """Reads token ids: the logits [S, V] after the last token of each prompt, and the state of S rows.

    Args:
        state: what each prompt continues, one row a prompt; None = nothing.
        chunk: tokens a model call at most, of all prompts together.
        progress: called after every model call with (tokens read, tokens in all).

    Raises:
        InputError: no prompts, an empty prompt, a state that does not fit.
    """
    check_prompts(prompts, state)
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    device = model.device
    rows = [model.initial_state() if state is None else state[i] for i in range(len(prompts))]
    logits: list[Tensor] = []  # a prompt's last part is never before that of the prompt in front of it
    total, done = sum(map(len, prompts)), 0
    for pack in _packs([len(prompt) for prompt in prompts], chunk):
        ids: list[int] = []
        cu = [0]
        for i, start, end in pack:
            ids.extend(prompts[i][start:end])
            cu.append(len(ids))
        before = State.stack([rows[i] for i, _, _ in pack])
        last, after = model(torch.tensor([ids], device=device), before, cu_seqlens=tuple(cu), last_only=True)
        for row, (i, _, end) in enumerate(pack):
            rows[i] = after[row]
            if end == len(prompts[i]):
                logits.append(last[0, row])
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


def _packs(lengths: Sequence[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts sequences into calls of at most `chunk` tokens: lists of (sequence, start, end), in order.

    A sequence is cut where it would be alone: cut elsewhere it rounds elsewhere, which 16 bits show in the text.
    """
    pack: list[tuple[int, int, int]] = []
    room = chunk
    for i, length in enumerate(lengths):
        for start in range(0, length, chunk):
            end = min(length, start + chunk)
            if end - start > room:
                yield pack
                pack, room = [], chunk
            pack.append((i, start, end))
            room -= end - start
    if pack:
        yield pack
