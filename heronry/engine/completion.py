"""What generating text returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, Literal

from ..errors import InputError
from ..models import State
from ..text.tools import ToolCall

# "stop": an end of text, a stop id or a stop string; "length": max_tokens were generated; "tool_calls": it calls tools
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities of one step, by the model alone: before temperature, penalties, bias and masks.

    rank: of the token, 1 for the most likely one.
    top_logprobs: the most likely token ids with theirs, the best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top_logprobs: dict[int, float]

    def with_top(self, n: int) -> TokenLogprob:
        """With so many of the most likely tokens at most."""
        return replace(self, top_logprobs=dict(islice(self.top_logprobs.items(), n)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. prompt_tokens: those read for this prompt, without what a given state had read before."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """The text a model wrote after a prompt, or in a stream the next piece of it. `str(completion)` is the text.

    Attributes:
        text: without the prompt, and without the stop string that ended it.
        token_ids: the tokens behind `text`. Where a stop string ended the text, its tokens are the last of them.
        finish_reason: why it ended; None while a stream goes on.
        logprobs: one entry a token where they were asked for, else None.
        usage: token counts, in a stream those so far.
        index, choice: which of the prompts, and which of its `n` completions, from 0.
        reasoning, tool_calls: the thought and the calls of an answer to a list of messages, which are not in `text`.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprob] | None
    usage: Usage
    index: int = 0
    choice: int = 0
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    make_state: Callable[[], State] = field(repr=False, compare=False, kw_only=True)

    def __str__(self) -> str:
        return self.text

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with its state, in place of the way to it."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "make_state": partial(_given, self.state)}

    @cached_property
    def state(self) -> State:
        """One row: the state after the prompt and every token so far; generation can go on from it."""
        return self.make_state()


def _given(state: State) -> State:
    return state


class Pieces:
    """Puts a completion together from its pieces. Of each only the text and the numbers are kept: a piece can give its
    state, and so holds the memory of one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCall] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.last: Completion | None = None

    def add(self, piece: Completion) -> None:
        """Takes the next piece."""
        self.texts.append(piece.text)
        self.thoughts.append(piece.reasoning)
        self.calls += piece.tool_calls
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs or ()
        self.last = piece

    def joined(self) -> Completion:
        """The completion, after its last piece; InputError where none came, as in a chat that moved on meanwhile."""
        if self.last is None:
            raise InputError("the conversation moved on while this answer was written")
        return Completion(
            text="".join(self.texts),
            token_ids=self.token_ids,
            finish_reason=self.last.finish_reason,
            logprobs=None if self.last.logprobs is None else self.logprobs,
            usage=self.last.usage,
            index=self.last.index,
            choice=self.last.choice,
            reasoning="".join(self.thoughts),
            tool_calls=self.calls,
            make_state=self.last.make_state,
        )


def join(pieces: Iterable[Completion]) -> Completion:
    """One completion out of all its pieces."""
    collected = Pieces()
    for piece in pieces:
        collected.add(piece)
    return collected.joined()
