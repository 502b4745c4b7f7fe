"""Which state covers a text that ends inside of what the model has read: at a stop string, white space, half a
character.

The states of the last steps are kept as marks, by how many characters of what was read they cover, until it is certain
where the text ends. The longest whose text is a prefix of it is taken; the rest is owed, and read in front of what
comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..models import State
from .batch import Row
from .completion import Completion
from .decode_batch import Event

T = TypeVar("T")


def useful_marks(marks: Mapping[int, T], answer: str, said: str, separator: str) -> dict[int, T]:
    """The marks that some end of the answer may still need: the last one within it, those within the separator that may
    follow it, and those of text that is not certain yet."""
    within = max(n for n in marks if n <= len(answer))
    after = len(answer) + len(separator)
    return {n: mark for n, mark in marks.items() if within <= n <= after or n >= len(said)}


def last_mark(marks: Iterable[int], text: str, read: str) -> int:
    """The longest mark that `text` holds."""
    return max(n for n in marks if text.startswith(read[:n]))


@dataclass(frozen=True)
class Ending:
    """Where a text ended.

    state: one row, which knows its text; n_tokens: that it has read since the prompt began.
    owed: what the text has beyond that of the state.
    """

    state: State
    n_tokens: int
    owed: str


class AnswerState:
    """Follows one sequence of a scheduler, on its thread, to the state after its text.

    The marks are events, whose states are cut out of the batch's only at the end: the rows of a batch's earlier states
    never change, and what is kept of them is mostly the last.
    """

    def __init__(self, text: str, n_tokens: int, separator: str = "", *, strip: bool = False):
        """
        Args:
            text: of the prompt, from the beginning; n_tokens: of the prompt.
            separator: follows the text.
            strip: the text ends in front of white space.
        """
        self._text, self._n_tokens = text, n_tokens
        self._separator, self._strip = separator, strip
        self._read = self._certain = ""
        self._marks: dict[int, tuple[int, State | Event]] = {}
        self.ending: Ending | None = None

    def begin(self, state: State) -> None:
        """state: after the prompt."""
        self._marks[0] = 0, state

    def push(self, event: Event, row: Row, piece: Completion | None) -> None:
        """Takes an event, after the row has taken it and given a piece."""
        if piece is not None:
            # half a character that never became whole is no text
            self._certain += piece.text.removesuffix(row.decoded) if event.token is None else piece.text
        if event.token is not None:
            self._read += row.decoded
            if row.decoder.whole and event.again is None:
                self._marks[len(self._read)] = len(row.token_ids), event
        answer = self._certain.rstrip() if self._strip else self._certain
        self._forget(answer)
        if piece is not None and piece.finish_reason is not None:
            self._end(answer, row, piece)

    def _forget(self, answer: str) -> None:
        """The marks that no end of the answer needs any more."""
        self._marks = useful_marks(self._marks, answer, self._certain, self._separator)

    def _end(self, answer: str, row: Row, piece: Completion) -> None:
        """The text has ended with this piece."""
        self._end_at(last_mark(self._marks, answer + self._separator, self._read), answer)

    def _end_at(self, n: int, answer: str) -> None:
        """At one of the marks."""
        count, mark = self._marks[n]
        state = mark if isinstance(mark, State) else mark.state
        known = state.with_texts([self._text + self._read[:n]])
        self.ending, self._marks = Ending(known, self._n_tokens + count, (answer + self._separator)[n:]), {}


class ResumableAnswer(AnswerState):
    """The same for an answer that may be cut, by its length or because nobody waits for it, and gone on with later:
    then the state lacks at least the last token, for the prediction comes from reading it again.

    tokens: of the whole answer, once it is cut, up to the last whole character.
    """

    def __init__(self, text: str, n_tokens: int, separator: str, earlier: tuple[int, State] | None = None):
        """earlier: so many tokens of the answer, and the state after them, where one is gone on with."""
        super().__init__(text, n_tokens, separator, strip=True)
        self.tokens: list[int] | None = None
        self._earlier, self._replayed, self._whole = earlier, 0, 0
        if earlier is not None and not earlier[0]:
            self._marks[0] = earlier

    def replay(self, row: Row, said: str) -> None:
        """Takes a token that was drawn earlier, after the row has. said: what is certain of its text."""
        self._certain += said
        self._read += row.decoded
        self._replayed = len(row.token_ids)
        if self._earlier is not None and self._earlier[0] == self._replayed:
            self._marks[len(self._read)] = self._earlier

    def begin(self, state: State) -> None:
        self._whole = self._replayed
        self._marks[len(self._read)] = self._replayed, state

    def push(self, event: Event, row: Row, piece: Completion | None) -> None:
        if event.token is not None and row.decoder.whole:
            self._whole = len(row.token_ids)
        super().push(event, row, piece)

    def _forget(self, answer: str) -> None:
        within = sorted(n for n in self._marks if n <= len(answer))
        before = {n: self._marks[n] for n in within[-2:-1]}
        super()._forget(answer)
        self._marks = before | self._marks

    def _end(self, answer: str, row: Row, piece: Completion) -> None:
        if piece.finish_reason == "stop":
            super()._end(answer, row, piece)
            return
        self.tokens = row.token_ids[: self._whole]
        marks = [n for n, (count, _) in self._marks.items() if n <= len(answer) and count < max(1, self._whole)]
        self._end_at(max(marks), answer)
