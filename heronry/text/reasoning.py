"""The thought at the beginning of an answer: what stands between "<think" and the first "</think>"."""

from __future__ import annotations

from collections.abc import Callable

THINK, END_OF_THOUGHT = "<think", "</think>"


class ThoughtParser:
    """Reads an answer character by character: the thought here, and in subclasses what follows it.

    Each character goes in order to a part of the answer or to none, at once or after it was held; what is held may be
    read again.
    """

    def __init__(self, n_hidden: int) -> None:
        """n_hidden: so many characters, from the first, are read but not handed out."""
        self._reasoning, self._content = TrimmedText(), TrimmedText()
        self._hidden = n_hidden
        self._state: Callable[[str], None] = self._begin  # takes the next character
        self._input: list[tuple[str, int]] = []  # what is to be read, and from where on; the next last
        self._held = ""  # what may become a mark

    @property
    def is_thinking(self) -> bool:
        """Whether the thought is not over."""
        return self._state in (self._begin_thought, self._think)

    def _read(self, text: str) -> None:
        self._input.append((text, 0))
        while self._input:
            text, at = self._input.pop()
            at = self._read_plain(text, at)
            if at < len(text):
                self._input.append((text, at + 1))
                self._state(text[at])

    def _read_plain(self, text: str, at: int) -> int:
        """Reads what can be no mark at once, for speed; returns where it ends."""
        if self._state != self._think or self._held:
            return at
        end = text.find("<", at)
        end = len(text) if end < 0 else end
        self._hand_out(text[at:end], self._reasoning)
        return end

    def _finish_thought(self) -> None:
        """At the end of the text."""
        if self._state == self._think:
            self._hand_out(self._held, self._reasoning)
            self._held = ""
        elif self._state == self._begin:
            self._leave(self._begin_content)
            self._read("")

    def _begin(self, c: str) -> None:
        """In front of the text."""
        if not self._held and c.isspace():
            self._hand_out(c)
            return
        self._held += c
        if self._held == THINK:
            self._hand_out(self._held)
            self._held, self._state = "", self._begin_thought
        elif not THINK.startswith(self._held):
            self._leave(self._begin_content)

    def _leave(self, state: Callable[[str], None]) -> None:
        """What was held is read by another state."""
        self._input.append((self._held, 0))
        self._held, self._state = "", state

    def _begin_thought(self, c: str) -> None:
        """Behind "<think"."""
        self._state = self._think
        if c == ">":
            self._hand_out(c)
        else:
            self._think(c)

    def _think(self, c: str) -> None:
        self._held += c
        if self._held == END_OF_THOUGHT:
            self._hand_out(self._held)
            self._held, self._state = "", self._begin_content
        elif not END_OF_THOUGHT.startswith(self._held):
            keep = c if c == "<" else ""
            self._hand_out(self._held.removesuffix(keep), self._reasoning)
            self._held = keep

    def _begin_content(self, c: str) -> None:
        """Behind the thought."""
        self._hand_out(c, self._content)

    def _hand_out(self, text: str, part: TrimmedText | None = None) -> None:
        """To a part, or to none."""
        visible = self._visible(text, part)
        if part is not None:
            part.put(visible)

    def _visible(self, text: str, part: TrimmedText | None) -> str:
        """What of it is handed out."""
        hidden, text = text[: self._hidden], text[self._hidden :]
        self._hidden -= len(hidden)
        if part is not None and hidden.strip():
            part.has_begun = True
        return text


class TrimmedText:
    """A text that is handed out in pieces, without white space around it."""

    def __init__(self) -> None:
        self.has_begun = False
        self._out: list[str] = []
        self._space: list[str] = []  # said if something follows it

    def put(self, text: str) -> None:
        if body := text.rstrip():
            self._out += [*self._space, body if self.has_begun else body.lstrip()]
            self._space, self.has_begun = [], True
        if self.has_begun:
            self._space.append(text[len(body) :])

    def take(self) -> str:
        out, self._out = "".join(self._out), []
        return out
