"""What a scheduler takes in and gives out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..models import Model, State
from .completion import TokenLogprob
from .decode_batch import Event, SequenceDecoder


class Busy(Exception):
    """No more requests are taken in for now. retry_after: seconds after which there may be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Receiver(Protocol):
    """What a request's results are given to, on the scheduler's thread: it must return at once."""

    def on_prompt(self, state: State, logprobs: list[TokenLogprob]) -> None:
        """The prompt was read: the state of one row after it, and the log-probabilities of its tokens but the first,
        where they were asked for."""

    def on_event(self, choice: int, event: Event) -> bool:
        """A token of one of the request's sequences, by its number, or its end. Returns whether the sequence is to go
        on."""

    def on_error(self, error: Exception) -> None:
        """The request has ended without what was asked for."""


@dataclass(eq=False)
class Request:
    """A prompt, and sequences to decode after it.

    tokens: the ids of the prompt.
    sequences: each is drawn from the same state after it.
    receiver: gets the results.
    begin: how many of the tokens a state has read, and that state of one row: a position on the grid of CallSizes, or
        for a state that is continued 0.
    cuts: positions on the grid at which `on_cut` gets the state, to keep it.
    prompt_logprobs: log-probabilities of the prompt's tokens, with so many of the most likely ones; None = of none.
    on_outputs: gets what the model returns for each part of the prompt, [T, V].
    owner: who shares the machine fairly with other owners.
    """

    model: Model
    tokens: Sequence[int]
    sequences: Sequence[SequenceDecoder]
    receiver: Receiver
    begin: tuple[int, State | None] = (0, None)
    cuts: Sequence[int] = ()
    on_cut: Callable[[int, State], None] | None = None
    prompt_logprobs: int | None = None
    on_outputs: Callable[[Tensor], None] | None = None
    owner: str = ""
    cancelled: bool = field(default=False, init=False)
    admitted: float = field(init=False)  # when it had waited, by `time.perf_counter`
    position: int = field(init=False)  # tokens that were read
    state: State | None = field(init=False)  # after them
    unfinished: int = field(init=False)  # sequences
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    logits: Tensor | None = field(default=None, init=False)  # [V], after the last token read

    def __post_init__(self) -> None:
        self.begin_at(*self.begin)
        self.unfinished = len(self.sequences)

    @property
    def rows(self) -> int:
        return max(1, len(self.sequences))

    def begin_at(self, position: int, state: State | None) -> None:
        """So many of the tokens need not be read: a position on the grid, and the state of one row there."""
        if state is not None and state.layers[0].wkv.device != self.model.device:
            state = state.to(self.model.device)
        self.begin = self.position, self.state = position, state

    def cancel(self) -> None:
        """Nothing more of it is wanted; it leaves before the next step."""
        self.cancelled = True


@dataclass(frozen=True)
class Limits:
    """What a scheduler takes in.

    rows: sequences that are read or decoded at a time.
    waiting: requests that wait for rows.
    tokens: of a prompt.
    state_bytes: of the states of all rows together.
    pause: seconds for which sequences that are decoded wait for prompts between two steps, about; one short call is
        always made.
    """

    rows: int = 64
    waiting: int = 256
    tokens: int = 1 << 20
    state_bytes: int = 8 << 30
    pause: float = 0.2


@dataclass
class Totals:
    """Counts since the start, and what is going on now."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: int = 0  # requests, whatever their end
    waiting: int = 0
    reading: int = 0
    decoding: int = 0  # sequences
