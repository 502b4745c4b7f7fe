"""Decoding: sequences that take a step together, and may join and leave between two steps.

- a sequence that leaves lets its row stand idle, and the next one that joins takes it: one row is copied, not all
- idle rows are removed once they are a quarter of all
- a token is handed out once the model has read it, so the state beside it covers everything handed out so far:
  generation that is stopped here, for whatever reason, can continue from that state without reading anything again
- tokens that a grammar leaves no choice about are read in one call, of their own sequence: read together they round
  otherwise than one by one, so whether they are must not depend on others
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from math import inf

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from .call_sizes import CallSizes
from .completion import FinishReason, TokenLogprob
from .constraints import Matcher
from .draw import Drawing, draw_rows
from .sampling import Mask, Sampler, Sampling

MAX_FORCED = 64  # tokens read in one call, while others wait


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one sequence, or its end.

    index: which sequence.
    token: None at the end; an end-of-text id is not handed out.
    finish_reason: None before the end.
    logprob: of the token, where it was asked for; of the id that ends the text too.
    batch: the state of all rows; `state` is this one's.
    again: what is still to be read into it, for a token in the middle of those that were read in one call.
    error: why no token could be drawn, where that is the end.
    stop_id: which of the stop ids was drawn, where that is the end.
    """

    index: int
    token: int | None
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None
    batch: State
    row: int
    error: Exception | None = None
    again: Callable[[State], State] | None = None
    stop_id: int | None = None

    @property
    def state(self) -> State:
        """One row: the state after the prompt and every token handed out so far, this one included. To be taken before
        another sequence joins the batch."""
        state = self.batch if len(self.batch) == 1 else self.batch[self.row]
        return state if self.again is None else self.again(state)


@dataclass(eq=False)
class SequenceDecoder:
    """Draws the tokens of one sequence.

    sampling: see `Sampling`.
    max_tokens: handed out at most.
    stop_ids: drawing one of them ends the sequence.
    min_tokens: no stop id is drawn before so many tokens were.
    top_logprobs: log-probabilities of each token and of so many of the most likely ones; None = of none.
    mask: see `Mask`.
    prompt: its token ids, for `repetition_penalty`.
    decode: the text of a token, for `penalize_digits=False`.
    earlier: what the model wrote before, at the end of the prompt, as the penalties count it.
    matcher: what it must follow. A stop id may come where the text may end.
    drawn: the tokens so far.
    """

    sampling: Sampling
    max_tokens: int
    stop_ids: Collection[int] = ()
    min_tokens: int = 0
    top_logprobs: int | None = None
    mask: Mask | None = None
    prompt: Sequence[int] = ()
    decode: Callable[[int], str] | None = None
    earlier: Sequence[int] = ()
    matcher: Matcher | None = None
    drawn: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling, self.prompt, self.decode, self.earlier)
        # where the caller bans tokens, the text may have to be cut into others
        self._may_force = self.mask is None and -inf not in self.sampling.logit_bias.values()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it has ended, before a stop id is drawn; None if it has not."""
        if self.matcher is not None and self.matcher.ended:
            return "stop"
        return "length" if len(self.drawn) >= self.max_tokens else None

    def choose(self, logits: Tensor) -> Drawing | list[int]:
        """What comes next after logits [V], float32 on the CPU: a token that is to be drawn, or some that must come."""
        if tokens := self._forced():
            return tokens
        allowed = self.mask(list(self.drawn)) if self.mask else None  # a copy: the caller may keep it
        banned = self.stop_ids if len(self.drawn) < self.min_tokens else ()
        return self._sampler.prepare(logits, allowed, banned, self._grammar())

    def take(self, tokens: list[int], logits: Tensor) -> TokenLogprob | None:
        """Goes on with what was chosen after logits [V], which may be one of `stop_ids`; returns the first token's
        log-probability."""
        for token in tokens:
            self._sampler.count(token)
        logprob = self.logprob_of(tokens[0], logits)
        if tokens[0] not in self.stop_ids:
            self.drawn += tokens
            if self.matcher is not None:
                for token in tokens:
                    self.matcher.consume(token)
        return logprob

    def logprob_of(self, token: int, logits: Tensor) -> TokenLogprob | None:
        """The log-probability of a token under logits [V], float32 on the CPU, if it was asked for."""
        if self.top_logprobs is None:
            return None
        return token_logprob(token, torch.log_softmax(logits, 0), self.top_logprobs)

    def _forced(self) -> list[int]:
        if self.matcher is None or not self._may_force:
            return []
        room = min(MAX_FORCED, self.max_tokens - len(self.drawn))
        return list(takewhile(lambda token: token not in self.stop_ids, self.matcher.forced()[:room]))

    def _grammar(self) -> Tensor | None:
        """What the matcher allows, bool [V]: a stop id only where the text may end."""
        if self.matcher is None:
            return None
        allowed = self.matcher.allowed()
        if self.matcher.complete and self.stop_ids:
            allowed = allowed.clone()
            allowed[list(self.stop_ids)] = True
        return allowed


def token_logprob(token: int, logprobs: Tensor, top: int) -> TokenLogprob:
    """The entry of a token, and of the `top` most likely ones, from log-probabilities [V], float32 on the CPU."""
    values, ids = logprobs.topk(min(top, len(logprobs)))
    rank = 1 + int((logprobs > logprobs[token]).sum())
    return TokenLogprob(token, float(logprobs[token]), rank, dict(zip(ids.tolist(), values.tolist(), strict=True)))


class DecodeBatch:
    """At most `sizes.rows` sequences of one model."""

    def __init__(self, model: Model, sizes: CallSizes):
        self._model = model
        self._sizes = sizes
        self._rows: list[tuple[int, SequenceDecoder] | None] = []  # None: idle
        self._logits: list[Tensor] = []  # [V] of each row
        self._state: State | None = None  # of all rows
        self._owned = False  # the state is known to nobody but the events of the last step

    def __len__(self) -> int:
        """The number of sequences."""
        return sum(row is not None for row in self._rows)

    @property
    def free(self) -> int:
        """How many more may join."""
        return self._sizes.rows - len(self)

    def numbers(self) -> list[int]:
        """Of its sequences."""
        return [row[0] for row in self._rows if row is not None]

    @torch.inference_mode()
    def add(self, sequences: Mapping[int, SequenceDecoder], logits: Tensor, state: State) -> None:
        """Sequences join, each with a number of its own; at most `free`.

        Args:
            logits: [S, V], after what each has read.
            state: of S rows.
        """
        logits = logits.to("cpu", torch.float32)
        if not len(self):
            self._rows, self._logits, self._state, self._owned = [*sequences.items()], [*logits], state, False
            return
        missing = len(sequences) - self._rows.count(None)
        if missing > 0:  # with room for the next ones
            self._resize(max(len(self._rows) + missing, min(self._sizes.rows, len(self._rows) * 5 // 4)))
        elif not self._owned:
            self._resize(len(self._rows))
        idle = [i for i, row in enumerate(self._rows) if row is None]
        for j, (i, sequence) in enumerate(zip(idle, sequences.items(), strict=False)):
            self._rows[i], self._logits[i] = sequence, logits[j]
            self._put(i, state, j)

    def _put(self, row: int, state: State, of: int) -> None:
        """Writes row `of` of a state into the batch's, which is owned."""
        assert self._state is not None
        for x, y in zip(self._state.tensors(), state.tensors(), strict=True):
            x[row] = y[of]
        if state.contexts:
            contexts = list(self._state.contexts)
            contexts[row] = state.contexts[of]
            self._state.contexts = tuple(contexts)

    def _resize(self, rows: int) -> None:
        """Moves all sequences to memory of their own, with so many rows. What is in idle ones does not matter."""
        assert self._state is not None
        kept = [i for i, row in enumerate(self._rows) if row is not None]
        picked = kept + [kept[0]] * (rows - len(kept))
        self._rows = [self._rows[i] for i in kept] + [None] * (rows - len(kept))
        self._logits = [self._logits[i] for i in picked]
        self._state, self._owned = self._state[picked], True

    def drop(self, index: int) -> None:
        """A sequence leaves; no further event of it comes."""
        self._rows = [None if row is not None and row[0] == index else row for row in self._rows]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token for every sequence, or those that a grammar forces, or its end."""
        events: list[Event] = []
        picked: list[tuple[list[int], TokenLogprob | None]] = [([], None)] * len(self._rows)
        for i, chosen in enumerate(self._choose()):
            held = self._rows[i]
            if held is None:
                continue
            index, sequence = held
            assert self._state is not None
            try:
                reason, logprob, stop_id = sequence.finish_reason, None, None
                if reason is None:
                    if isinstance(chosen, Exception):
                        raise chosen
                    logprob = sequence.take(chosen, self._logits[i])
                    if chosen[0] not in sequence.stop_ids:
                        picked[i] = chosen, logprob
                        continue
                    reason, stop_id = "stop", chosen[0]
            except Exception as error:
                events.append(Event(index, None, None, None, self._state, i, error))
            else:
                events.append(Event(index, None, reason, logprob, self._state, i, stop_id=stop_id))
            self._rows[i] = None
        count = len(self)
        if not count:
            return events
        alone = sum(len(tokens) > 1 for tokens, _ in picked)  # sequences that read by themselves
        if count <= len(self._rows) * 3 // 4 or alone == count:
            self._resize(count)
            picked = [x for x in picked if x[0]]
        before = self._state
        assert before is not None
        if alone < count:
            ids = [tokens[0] if len(tokens) == 1 else 0 for tokens, _ in picked]
            logits, self._state = self._model(torch.tensor(ids, device=self._model.device)[:, None], before)
            self._logits, self._owned = [*logits[:, -1].to("cpu", torch.float32)], True  # all rows at once
        for i, held in enumerate(self._rows):
            if held is None:
                continue
            (index, sequence), (tokens, logprob) = held, picked[i]
            assert self._state is not None
            if len(tokens) > 1:
                events += self._read_forced(i, before[i], tokens, logprob)
            else:
                events.append(Event(index, tokens[0], None, logprob, self._state, i))
            if (reason := sequence.finish_reason) is not None:
                events.append(Event(index, None, reason, None, self._state, i))
                self._rows[i] = None
        return events

    def _choose(self) -> list[list[int] | Exception]:
        """What comes next in each row, or why nothing can; nothing in one that is idle or has ended."""
        chosen: list[list[int] | Exception] = [[]] * len(self._rows)
        drawings: dict[int, Drawing] = {}
        for i, held in enumerate(self._rows):
            if held is None or held[1].finish_reason is not None:
                continue
            try:
                found = held[1].choose(self._logits[i])
            except Exception as error:  # of a mask, which is the caller's, or of what leaves no token
                chosen[i] = error
                continue
            if isinstance(found, Drawing):
                drawings[i] = found
            else:
                chosen[i] = found
        for i, token in zip(drawings, draw_rows([*drawings.values()]), strict=True):
            chosen[i] = token if isinstance(token, InputError) else [token]
        return chosen

    def _read_forced(self, row: int, before: State, tokens: list[int], logprob: TokenLogprob | None) -> list[Event]:
        """One sequence reads several tokens."""
        held = self._rows[row]
        assert held is not None
        assert self._state is not None
        index, sequence = held
        logits, after = self._model(torch.tensor([tokens], device=self._model.device), before)  # [1, T, V]
        self._logits[row] = logits[0, -1].to("cpu", torch.float32, copy=True)  # the others can go
        self._put(row, after, 0)
        events = []
        for n, token in enumerate(tokens, 1):
            if n > 1:
                logprob = sequence.logprob_of(token, logits[0, n - 2].to("cpu", torch.float32))
            if n < len(tokens):
                again = partial(_read, self._model, tokens[:n])
                events.append(Event(index, token, None, logprob, before, 0, again=again))
            else:
                events.append(Event(index, token, None, logprob, self._state, row))
        return events


@torch.inference_mode()
def _read(model: Model, tokens: list[int], state: State) -> State:
    """The state after some more tokens."""
    return model(torch.tensor([tokens], device=model.device), state, last_only=True)[1]
