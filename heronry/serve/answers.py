"""Answers of models, taken apart while they are written: what all routes with messages share."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.completion import Completion, TokenLogprob
from ..text.chat_templates import Prompt
from ..text.tool_calls import AnswerParser
from ..text.tools import ToolCall


class AnswerPiece:
    """What is new of an answer. logprobs: of the tokens of its content."""

    def __init__(self, reasoning: str, content: str, calls: list[ToolCall], reason: str | None):
        self.reasoning, self.content, self.calls, self.finish_reason = reasoning, content, calls, reason
        self.logprobs: list[TokenLogprob] = []


class Answer:
    """Takes the text of one answer apart.

    written: its tokens so far; thought: those of them that were thoughts.
    """

    def __init__(self, prompt: Prompt, stops: Sequence[str] = (), only_one: bool = False):
        """stops: end what is said. only_one: the answer ends with its first call."""
        self.parser = AnswerParser(prompt.tools, opening=prompt.opening, beginning=prompt.beginning, stops=stops)
        self.only_one = only_one
        self.any_call = False
        self.written = self.thought = 0
        self.held: list[TokenLogprob] = []  # of tokens whose text is held

    def take(self, piece: Completion) -> AnswerPiece:
        """The next piece; it has a finish_reason where the answer is over, which may be before the text is."""
        self.written = piece.usage.completion_tokens
        new = self.parser.feed(piece.text)
        reasoning, content, calls = new
        reason: str | None = piece.finish_reason
        if self.parser.stopped or (self.only_one and self.parser.has_called):
            reason = "stop"
        if reason is not None:
            rest = self.parser.finish()
            reasoning, content, calls = reasoning + rest.reasoning, content + rest.content, calls + rest.calls
        if self.parser.is_thinking or (reasoning and not content):
            self.thought = self.written
        if self.only_one:
            calls = calls[: 0 if self.any_call else 1]
        self.any_call |= bool(calls)
        if self.any_call and reason is not None:
            reason = "tool_calls"
        found = AnswerPiece(reasoning, content, calls, reason)
        self.held += piece.logprobs or ()
        if content:
            found.logprobs, self.held = self.held, []
        elif reasoning or calls:
            self.held = []
        return found
