"""Values of a JSON file one at a time, however large the file is.

- the file is an array, or values one after another, as in JSON Lines but with line breaks anywhere
- a value is found by its brackets alone; whoever gets it parses it, so a bad one does not end the file
- reading can begin again behind any value
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .text_files import TextFile, named_errors

BLOCK = 1 << 16  # bytes that are read at once
MAX_VALUE = 1 << 28  # bytes; a bracket that is missing must not bring the rest of a large file into memory
BLANK = re.compile(rb"[ \t\r\n]*")
STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?P<closed>"?)|[\[\]{}]', re.DOTALL)
SCALAR = re.compile(rb"[^ \t\r\n,\[\]{}\"]*")


class Item(NamedTuple):
    """A value."""

    text: bytes
    line: int  # where it begins, the first being 1
    end: int  # bytes of the text up to its end


def starts_with_array(path: Path) -> bool:
    """Whether the first character is "["."""
    with named_errors(path), TextFile(path) as file:
        while block := file.read(BLOCK):
            if start := block.lstrip(b" \t\r\n"):
                return start.startswith(b"[")
    return False


def json_items(file: TextFile, resumes: bool) -> Iterator[Item]:
    """Yields the values from where the file is open: at its beginning or, if it `resumes`, behind a value.

    Raises:
        InputError: something between the values that is not JSON, or a value that does not end.
    """
    return _Reader(file, resumes).items()


class _Reader:
    """The part of the file that is in memory, and how far it has been read."""

    def __init__(self, file: TextFile, resumes: bool):
        self.file, self.resumes = file, resumes
        self.in_array = starts_with_array(file.path)
        self.line = file.line_number(file.offset) if resumes else 1
        self.buffer, self.at = b"", 0

    def items(self) -> Iterator[Item]:
        first = not self.resumes
        if first and self.in_array:
            self._skip_blank()
            self.at += 1
        while start := self._skip_blank():
            if self.in_array and start == b"]":
                self.at += 1
                if rest := self._skip_blank():
                    raise self._error(f"{rest.decode('latin-1')!r} behind the array")
                return
            if self.in_array and not first:
                if start != b",":
                    raise self._error(f"expected ',' or ']', got {start.decode('latin-1')!r}")
                self.at += 1
                self._skip_blank()
            first = False
            text = self._value()
            yield Item(text, self.line, self.file.offset - len(self.buffer) + self.at)
            self.line += text.count(b"\n")
        if self.in_array:
            raise self._error("the file ends inside the array")

    def _read(self) -> bool:
        """Reads on, as much again as is in use; whether there was anything."""
        rest = self.buffer[self.at :]
        block = self.file.read(max(BLOCK, len(rest)))
        self.buffer, self.at = rest + block, 0
        return bool(block)

    def _skip_blank(self) -> bytes:
        """Goes to the next character that is not blank, and returns it; b"" at the end of the file."""
        while True:
            end = BLANK.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it matches anything
            self.line += self.buffer.count(b"\n", self.at, end)
            self.at = end
            if end < len(self.buffer):
                return self.buffer[end : end + 1]
            if not self._read():
                return b""

    def _value(self) -> bytes:
        """The value that begins here; goes behind it."""
        while (end := self._end_of_value()) is None:
            if len(self.buffer) - self.at > MAX_VALUE:
                raise self._error(f"a value does not end within {MAX_VALUE >> 20} MiB")
            if not self._read():
                raise self._error("the file ends inside a value")
        if end == self.at:
            raise self._error(f"expected a value, got {self.buffer[end : end + 1].decode('latin-1')!r}")
        text, self.at = self.buffer[self.at : end], end
        return text

    def _end_of_value(self) -> int | None:
        """Where the value that begins here ends; None if that has not been read yet."""
        if self.buffer[self.at : self.at + 1] not in (b"{", b"[", b'"'):
            end = SCALAR.match(self.buffer, self.at).end()  # type: ignore[union-attr]  # it matches anything
            return end if end < len(self.buffer) else None
        depth = 0
        for match in STRUCTURE.finditer(self.buffer, self.at):
            character = match[0][:1]
            if character == b'"':
                if not match["closed"]:
                    return None
            else:
                depth += 1 if character in b"[{" else -1
            if depth <= 0:
                return match.end()
        return None

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.file.path}, line {self.line}: not JSON ({reason})")
