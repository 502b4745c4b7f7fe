"""The one door to files of text, plain or compressed.

- text is UTF-8; a byte order mark at its beginning is no part of it, and bytes that are not UTF-8 are named with their
  line
- lines end with "\\n" only: U+2028, U+2029 and U+0085 are characters like others, which JSON may contain
- nothing is translated: the rest is byte for byte what is in the file
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def kind(name: str) -> str:
    """The suffix that says what is in a file, in lower case and without that of compression: ".jsonl" of X.JSONL.gz."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


class TextFile:
    """The bytes of a text, decompressed, from a position on; without a byte order mark at the beginning.

    Attributes:
        offset: how many bytes of the text have been read, the mark included; where reading can begin again.
    """

    def __init__(self, path: str | Path, offset: int = 0):
        """InputError: it is UTF-16 or UTF-32, or needs a package that is not installed."""
        self.path, self.offset = Path(path).expanduser(), offset
        self._file = open(self.path, "rb")  # noqa: SIM115  closed by `close`
        try:
            self._stream = self._decompress()
            if offset and self._stream is self._file:
                self._stream.seek(offset)
            elif offset:
                while offset > 0 and (skipped := len(self._stream.read(min(offset, 1 << 20)))):
                    offset -= skipped
            else:
                self._skip_mark()
        except BaseException:
            self._file.close()
            raise

    def _decompress(self) -> io.BufferedReader:
        stream: Any
        match self.path.suffix.lower():
            case ".gz":
                stream = gzip.GzipFile(fileobj=self._file)
            case ".bz2":
                stream = bz2.BZ2File(self._file)
            case ".xz":
                stream = lzma.LZMAFile(self._file)  # noqa: SIM115  it does not own the file
            case ".zst":
                try:
                    import pyarrow
                except ModuleNotFoundError:
                    raise InputError(f"{self.path}: reading .zst needs pyarrow: pip install 'heronry[train]'") from None
                stream = pyarrow.input_stream(self._file, compression="zstd")
            case _:
                return self._file
        return io.BufferedReader(stream, 1 << 16)

    def _skip_mark(self) -> None:
        start = self._stream.peek(4)[:4]
        for mark, encoding in FOREIGN_MARKS.items():
            if start.startswith(mark):
                raise InputError(f"{self.path}: is {encoding}; save it as UTF-8")
        if start.startswith(codecs.BOM_UTF8):
            self.offset = len(self._stream.read(len(codecs.BOM_UTF8)))

    @property
    def bytes_on_disk(self) -> int:
        """How many bytes of the file have been read, compressed as they are."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most so many; all for -1."""
        block = self._stream.read(size)
        self.offset += len(block)
        return block

    def lines(self) -> Iterator[bytes]:
        """The remaining lines, with their ends."""
        for line in self._stream:
            self.offset += len(line)
            yield line

    def line_number(self, offset: int) -> int:
        """In which line the byte at `offset` is, the first being 1. Reads the file again up to there."""
        with TextFile(self.path) as again:
            number, left = 1, offset - again.offset
            while left > 0 and (block := again.read(min(left, 1 << 20))):
                number, left = number + block.count(b"\n"), left - len(block)
            return number

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def named_errors(name: object) -> Iterator[None]:
    """InputError with the name of the file, for what reading it may raise: no permission, damaged compression."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{name}: cannot be read ({reason})") from error


def describe_bad_byte(error: UnicodeDecodeError, offset: int = 0) -> str:
    """offset: where the decoded bytes begin."""
    return f"byte 0x{error.object[error.start]:02x} at position {offset + error.start}"


def read_text(path: str | Path, limit: int = -1) -> str:
    """The text of a file.

    Args:
        limit: of bytes, after which the rest is left, with the character that it cuts; -1: all is read.

    Raises:
        InputError: it cannot be read or is not UTF-8.
    """
    with named_errors(path), TextFile(path) as file:
        text = file.read(limit)
        try:
            return codecs.utf_8_decode(text, "strict", len(text) != limit)[0]
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise InputError(f"{path}, line {line}: is not UTF-8 ({describe_bad_byte(error)})") from error
