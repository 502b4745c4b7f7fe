"""Pieces of text that may be calls, while they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tools import ToolCall

BRACKETS = {"{": "}", "[": "]"}


class ValueEnd:
    """Finds the end of an object or a list in JSON, or of a dict or a list of Python."""

    def __init__(self) -> None:
        self._open: list[str] = []  # the brackets that will close it
        self._quote = ""
        self._is_escaped = False

    def push(self, c: str) -> bool | None:
        """Takes the next character: True if it is the last one, False if it cannot stand there."""
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif c == "\\":
                self._is_escaped = True
            elif c == self._quote:
                self._quote = ""
        elif c in "\"'":
            self._quote = c
        elif c in BRACKETS:
            self._open.append(BRACKETS[c])
        elif c in "}]":
            if self._open.pop() != c:
                return False
            return None if self._open else True
        elif not (c.isspace() or c.isalnum() or c in "+-.,:_"):
            return False
        return None


@dataclass
class Block:
    """What may be calls.

    mark: in front of it.
    kind: "tag", "fence", or "all" that is said.
    text: behind the mark, by characters.
    calls: once its value is whole and reads as such.
    ticks, has_more: backticks, and other text than white space, behind the value.
    """

    mark: str
    kind: str
    text: list[str] = field(default_factory=list)
    value: ValueEnd = field(default_factory=ValueEnd)
    calls: list[ToolCall] = field(default_factory=list)
    ticks: int = 0
    has_more: bool = False
