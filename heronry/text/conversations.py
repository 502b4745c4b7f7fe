"""Conversations to learn from: the pieces that are encoded one by one, and which of their tokens the loss counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .chat_templates import Template


@dataclass(frozen=True)
class Dialogue:
    """Messages as `template` shows them, in the pieces that engine/chat.py encodes.

    A chat encodes the system text, and then every turn: the message with the beginning of the answer. What the model
    writes after it is the answer and the separator (a turn that ended otherwise is `owed` it, see there). So a piece
    is a turn, or an answer with the separator behind it. The loss counts what the model must write by itself: the
    answers and all of the stop text behind them. That of world and g1, "\\n\\nUser:", ends in the next turn.
    The last answer is followed by the end of text, or by the stop text where the tokenizer has no such id.

    marked: whether it has.
    """

    template: Template
    marked: bool

    def __call__(self, messages: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
        """Pieces, each with the number of characters at its beginning that count in the loss.

        Raises:
            InputError: messages that are not of user and assistant in turn, after at most one system text. A last
                message without an answer is left out.
        """
        template = self.template
        said = [_said(message) for message in messages]
        pieces: list[tuple[str, int]] = []
        if said and said[0][0] == "system":
            pieces.append((template.system.replace("{system}", template.clean(said.pop(0)[1])), 0))
        if len(said) < 2 or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(said)):
            raise InputError("the messages are not of user and assistant in turn")
        stop, separator = template.stops[0], template.separator
        turns = len(said) // 2
        for i in range(turns):
            turn = template.turn.replace("{user}", template.clean(said[2 * i][1]))
            ends = len(stop) - len(separator) if i and (separator + turn).startswith(stop) else 0
            pieces.append((turn, max(0, ends)))
            answer = self._answer(said[2 * i + 1][1])
            answer += separator if i < turns - 1 else "" if self.marked else stop
            pieces.append((answer, len(answer)))
        return pieces

    def _answer(self, text: str) -> str:
        """What comes after the beginning that the template makes: "Assistant:", or some of the thinking too."""
        text = text.replace("\r\n", "\n").strip()
        if not text:
            raise InputError("an answer is empty")
        if any(stop in text for stop in self.template.stops):  # where a chat would stop listening
            text = re.sub("\n+", "\n", text)
        begun = self.template.turn.rpartition(":")[2]
        if f" {text}".startswith(begun):
            return f" {text}"[len(begun) :]
        if begun.endswith("</think"):  # it skips the thinking, so answers need not have any
            return f">\n{text}"
        raise InputError(f"an answer does not begin with {begun.strip()!r}, as the template does")


def _said(message: dict[str, Any]) -> tuple[str, str]:
    role, text = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(text, str):
        raise InputError("a message has no role or no content")
    return role, text
