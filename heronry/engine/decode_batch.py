"""Decoding: sequences that take a step together, and may join and leave between two steps.

- a sequence that leaves lets its row stand idle, and the next one that joins takes it: one row is copied, not all
- idle rows are removed once they are a quarter of all
- a token is handed out once the model has read it, so the state beside it covers everything handed out so far:
  generation that is stopped here, for whatever reason, can continue from that state without reading anything again
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models import Model, State
from .call_sizes import CallSizes
from .completion import FinishReason, TokenLogprob
from .sampling import Mask, Sampler, Sampling


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one sequence, or its end.

    index: which sequence.
    token: None at the end; an end-of-text id is not handed out.
    finish_reason: None before the end.
    logprob: of the token, where it was asked for; of the id that ends the text too.
    batch: the state of all rows; `state` is this one's.
    error: why no token could be drawn, where that is the end.
    """

    index: int
    token: int | None
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None
    batch: State
    row: int
    error: Exception | None = None

    @property
    def state(self) -> State:
        """One row: the state after the prompt and every token handed out so far, this one included. To be taken before
        another sequence joins the batch."""
        return self.batch if len(self.batch) == 1 else self.batch[self.row]


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
    drawn: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.sampling, self.prompt, self.decode, self.earlier)

    def pick(self, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        """The next token from logits [V]; one of `stop_ids` is not among those drawn."""
        allowed = self.mask(list(self.drawn)) if self.mask else None  # a copy: the caller may keep it
        banned = self.stop_ids if len(self.drawn) < self.min_tokens else ()
        token = self._sampler.pick(logits, allowed, banned)
        if token not in self.stop_ids:
            self.drawn.append(token)
        if self.top_logprobs is None:
            return token, None
        logprobs = torch.log_softmax(logits.detach().to("cpu", torch.float32), 0)
        return token, token_logprob(token, logprobs, self.top_logprobs)


def token_logprob(token: int, logprobs: Tensor, top: int) -> TokenLogprob:
    """The entry of a token, and of the `top` most likely ones, from log-probabilities [V], float32 on the CPU."""
    values, ids = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


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
        if not len(self):
            self._rows, self._logits, self._state, self._owned = [*sequences.items()], [*logits], state, False
            return
        missing = len(sequences) - self._rows.count(None)
        if missing > 0:  # with room for the next ones
            self._resize(max(len(self._rows) + missing, min(self._sizes.rows, len(self._rows) * 5 // 4)))
        elif not self._owned:
            self._resize(len(self._rows))
        idle = [i for i, row in enumerate(self._rows) if row is None]
        assert self._state is not None
        for j, (i, sequence) in enumerate(zip(idle, sequences.items(), strict=False)):
            self._rows[i], self._logits[i] = sequence, logits[j]
            for x, y in zip(self._state.tensors(), state.tensors(), strict=True):
                x[i] = y[j]

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
        """One token for every sequence, or its end."""
        events: list[Event] = []
        drawn: list[tuple[int, TokenLogprob | None] | None] = [None] * len(self._rows)
        for i, held in enumerate(self._rows):
            if held is None:
                continue
            index, sequence = held
            assert self._state is not None
            if len(sequence.drawn) >= sequence.max_tokens:
                events.append(Event(index, None, "length", None, self._state, i))
            else:
                try:
                    token, logprob = sequence.pick(self._logits[i])
                except Exception as error:  # of a mask, which is the caller's, or of what leaves no token
                    events.append(Event(index, None, None, None, self._state, i, error))
                else:
                    if token not in sequence.stop_ids:
                        drawn[i] = token, logprob
                        continue
                    events.append(Event(index, None, "stop", logprob, self._state, i))
            self._rows[i] = None
        count = len(self)
        if not count:
            return events
        if count <= len(self._rows) * 3 // 4:
            self._resize(count)
            drawn = [x for x in drawn if x is not None]
        ids = torch.tensor([x[0] if x else 0 for x in drawn], device=self._model.device)[:, None]  # [B, 1]
        assert self._state is not None
        logits, self._state = self._model(ids, self._state)
        self._logits, self._owned = [*logits[:, -1].to("cpu", torch.float32)], True  # all rows at once
        for i, held in enumerate(self._rows):
            if held is not None and (x := drawn[i]) is not None:
                events.append(Event(held[0], x[0], None, x[1], self._state, i))
                if len(held[1].drawn) == held[1].max_tokens:
                    events.append(Event(held[0], None, "length", None, self._state, i))
                    self._rows[i] = None
        return events
