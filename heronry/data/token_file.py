"""Token files: documents as token ids on disk, read without loading them.

- the format is the pair PREFIX.bin and PREFIX.idx ("binidx") of Megatron and RWKV-LM; theirs are read as they are
- two companions are our own: PREFIX.mask, a byte a token (1: its prediction counts in the loss), only where something
  does not count, and PREFIX.json: which tokenizer, its vocabulary, the id that ends a text, how much there is
- the index, all numbers little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype of the ids, uint64 sequences S,
  uint64 length of the last table; int32 [S] tokens of each sequence, int64 [S] byte of .bin where each begins,
  int64 [D + 1] first sequence of each document, and S
- a writer knows at any time what of its files is certain, so that a run that was killed goes on from there
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, length of the table of documents
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LONGEST = 2**31 - 1  # tokens of a sequence; a longer document is several
BLOCK = 1 << 20  # numbers at a time, where there may be too many for the memory


class TokenFile:
    """A token file, mapped into memory.

    Attributes:
        prefix: its path without an ending.
        tokens: np.memmap [N] of whatever integer the file holds.
        offsets: int64 [D + 1], document d is tokens[offsets[d] : offsets[d + 1]]. `len` is D.
        mask: np.memmap uint8 [N], 1 where the prediction of that token counts; None = all count.
        about: what PREFIX.json says; {} without it.
        vocab_size: the vocabulary of the tokenizer; without PREFIX.json the largest id + 1.
        end_of_text: the id in front of every document: the one that ends texts, 0 where nothing is known of one.
        tokenizer: what `load_tokenizer` takes: "bytes", "world", the path of a tokenizer.json; None = unknown.
        notes: what the config.json of a model that learned from here should say (`save(notes=)`).
    """

    def __init__(self, prefix: str | Path):
        """
        Args:
            prefix: its path, with or without .bin or .idx.

        Raises:
            InputError: a missing half, a damaged or truncated file, files that contradict each other, no tokens.
        """
        self.prefix = without_ending(prefix)
        data, index = beside(self.prefix, ".bin"), beside(self.prefix, ".idx")
        for path, other in ((data, index), (index, data)):
            if not path.is_file():
                raise InputError(f"{path}: no such file" + ", the other half is there" * other.is_file())
        dtype, self.offsets = _read_index(index)
        count = int(self.offsets[-1])
        size = data.stat().st_size
        if size != count * dtype.itemsize:
            found = "truncated" if size < count * dtype.itemsize else "too long"
            raise InputError(f"{data}: is {found}: {size} bytes, where {index.name} says {count * dtype.itemsize}")
        if not count:
            raise InputError(f"{data}: holds no tokens")
        self.tokens = np.memmap(data, dtype, "r")
        self.mask = self._read_mask(count)
        self.about = self._read_about(count)
        self.end_of_text: int = self.about.get("end_of_text") or 0
        name = self.about.get("tokenizer")
        self.tokenizer: str | Path | None = name if name in ("bytes", "world", None) else self.prefix.parent / name
        # every document begins after this id (see sampling.py), so whoever uses the model should do the same
        self.notes: dict[str, Any] = {"opening_tokens": [self.end_of_text]}
        if self.about.get("template"):
            self.notes["chat_template"] = self.about["template"]

    @cached_property
    def vocab_size(self) -> int:
        told = self.about.get("vocab_size")
        blocks = (self.tokens[start : start + BLOCK] for start in range(0, len(self.tokens), BLOCK))
        return told or 1 + max(int(block.max()) for block in blocks)

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json beside it, if that is what it was made with."""
        return self.tokenizer if isinstance(self.tokenizer, Path) else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, d: int) -> np.ndarray:
        """The ids of one document, the end of text included; not copied."""
        return self.tokens[self.offsets[d] : self.offsets[d + 1]]

    def _read_mask(self, count: int) -> np.ndarray | None:
        path = beside(self.prefix, ".mask")
        if not path.is_file():
            return None
        if path.stat().st_size != count:
            raise InputError(f"{path}: has {path.stat().st_size} bytes for {count} tokens")
        return np.memmap(path, np.uint8, "r")

    def _read_about(self, count: int) -> dict[str, Any]:
        path = beside(self.prefix, ".json")
        if not path.is_file():
            return {}
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        if not isinstance(about, dict):
            raise InputError(f"{path}: does not describe a token file")
        for key, least in (("vocab_size", 1), ("end_of_text", 0)):
            value = about.get(key)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{path}: {key} is {value!r}")
        for key in ("tokenizer", "template"):
            if not isinstance(about.get(key), str | None):
                raise InputError(f"{path}: {key} is {about[key]!r}")
        for key, there in (("tokens", count), ("documents", len(self))):
            if about.get(key, there) != there:
                raise InputError(f"{path}: speaks of {about[key]} {key}, but there are {there}")
        return about


@dataclass(frozen=True)
class Written:
    """How much of a writer's files is certain."""

    tokens: int = 0
    documents: int = 0  # that have ended
    begun: int = 0  # tokens of the document that has not
    masked: bool = False  # whether some token does not count


class TokenWriter:
    """Writes a token file piece by piece; needs no memory for what is written.

    Everything goes to *.part files. `finish` gives them their names; `seal` and `publish` are its two halves, for
    those who keep notes of how far they are.
    """

    def __init__(self, prefix: str | Path, dtype: str, written: Written | None = None):
        """
        Args:
            dtype: of the ids: "uint16", "int32", or another of DTYPES.
            written: as `flush` told it: goes on from there, whatever was written after it is cut off.

        Raises:
            InputError: the parts are shorter than that.
        """
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype).newbyteorder("<")
        self.written = written or Written()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._ids = self._open(".bin", self.written.tokens * self.dtype.itemsize)
        self._sizes = self._open(".sizes", self.written.documents * 8)  # int64 a document
        self._mask = self._open(".mask", self.written.tokens) if self.written.masked else None

    def _open(self, ending: str, size: int) -> BinaryIO:
        path = part(self.prefix, ending)
        if size and (not path.is_file() or path.stat().st_size < size):
            raise InputError(f"{path}: is shorter than it was; begin anew with --restart")
        file = open(path, "r+b" if size else "wb")  # noqa: SIM115  closed by `seal` or `close`
        file.truncate(size)
        file.seek(size)
        return file

    def write(self, ids: np.ndarray, mask: np.ndarray | None = None, ends: bool = True) -> None:
        """Appends to the document that is open.

        Args:
            ids: integers [n] that fit the dtype.
            mask: [n], 1 or True where the prediction of the token counts; None = everywhere.
            ends: the document ends here.
        """
        before = self.written
        masked = before.masked
        if mask is not None and self._mask is None and not np.all(mask):
            self._mask, masked = self._open(".mask", 0), True
            for start in range(0, before.tokens, BLOCK):  # all counted until now
                self._mask.write(b"\x01" * min(BLOCK, before.tokens - start))
        self._ids.write(ids.astype(self.dtype, copy=False).tobytes())
        if self._mask is not None:
            counts = np.ones(len(ids), np.uint8) if mask is None else mask.astype(np.uint8)
            self._mask.write(counts.tobytes())
        begun = before.begun + len(ids)
        if ends:
            self._sizes.write(struct.pack("<q", begun))
        self.written = Written(before.tokens + len(ids), before.documents + ends, 0 if ends else begun, masked)

    def flush(self) -> Written:
        """Makes everything certain, a power cut included."""
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
        return self.written

    def close(self) -> None:
        """Stops where it is; the parts stay."""
        for file in self._files():
            file.close()

    def _files(self) -> list[BinaryIO]:
        return [file for file in (self._ids, self._sizes, self._mask) if file is not None and not file.closed]

    def seal(self, about: dict[str, Any]) -> None:
        """Writes index and PREFIX.json, still as parts; `about` gets the numbers of documents and tokens."""
        if self.written.begun or not self.written.tokens:
            raise ValueError("a token file ends with the end of a document")
        self.flush()
        self.close()
        with open(part(self.prefix, ".idx"), "wb") as file:
            _write_index(file, self.dtype, self.written.documents, lambda: self._lengths())
            os.fsync(file.fileno())
        about = about | {"documents": self.written.documents, "tokens": self.written.tokens}
        with open(part(self.prefix, ".json"), "w", encoding="utf-8") as text:
            text.write(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
            text.flush()
            os.fsync(text.fileno())

    def _lengths(self) -> Iterator[np.ndarray]:
        with open(part(self.prefix, ".sizes"), "rb") as file:
            while len(lengths := np.fromfile(file, "<i8", BLOCK)):
                yield lengths

    def finish(self, about: dict[str, Any]) -> None:
        """Gives everything its name. A .bin never has an index beside it that is not its own."""
        self.seal(about)
        publish(self.prefix, self.written.masked)


def publish(prefix: Path, masked: bool) -> None:
    """Gives the parts of a sealed writer their names, the index last; done twice it does no more than once."""
    index = part(prefix, ".idx")
    if not index.is_file():
        return  # the last time got through
    beside(prefix, ".idx").unlink(missing_ok=True)
    if not masked:
        beside(prefix, ".mask").unlink(missing_ok=True)
    for ending in (".bin", ".mask", ".json"):
        if part(prefix, ending).is_file() and (masked or ending != ".mask"):
            os.replace(part(prefix, ending), beside(prefix, ending))
    os.replace(index, beside(prefix, ".idx"))
    discard(prefix)


def discard(prefix: Path) -> None:
    """Deletes the parts of a writer."""
    for ending in (".bin", ".mask", ".json", ".idx", ".sizes"):
        part(prefix, ending).unlink(missing_ok=True)


def without_ending(path: str | Path) -> Path:
    """PREFIX of PREFIX, PREFIX.bin or PREFIX.idx."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # a prefix may have dots of its own


def part(prefix: Path, ending: str) -> Path:
    return beside(prefix, ending + ".part")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The dtype of the ids, and int64 [D + 1] where documents begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise InputError(f"{path}: not an index of tokens, which begins with MMIDIDX")
        if len(header) < HEADER.size:
            raise InputError(f"{path}: is truncated")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise InputError(
                f"{path}: is of version {version} with ids of type {code}; version 1 with integers is read"
            )
        if size != HEADER.size + 12 * sequences + 8 * documents:
            found = "truncated" if size < HEADER.size + 12 * sequences + 8 * documents else "too long"
            raise InputError(f"{path}: is {found} for {sequences} sequences")
        sizes = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        first = np.fromfile(file, "<i8", documents)
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    ends = np.zeros(sequences + 1, np.int64)
    np.cumsum(sizes, dtype=np.int64, out=ends[1:])
    if (sizes < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise InputError(f"{path}: is damaged: its sequences do not lie one after the other")
    if not documents or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
        raise InputError(f"{path}: is damaged: its documents are not its sequences")
    return dtype, ends[first]


def _write_index(file: BinaryIO, dtype: np.dtype, documents: int, lengths: Callable[[], Iterator[np.ndarray]]) -> None:
    """lengths: gives the tokens of all documents, block by block, as often as it is called."""
    code = next(code for code, name in DTYPES.items() if name == dtype.name)

    def sequences() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of a block: tokens of each sequence, sequences of each document."""
        for block in lengths():
            pieces = np.maximum(1, -(-block // LONGEST))
            if pieces.max() == 1:
                yield block, pieces
            else:
                parts = [
                    [LONGEST] * (n - 1) + [size - LONGEST * (n - 1)] for size, n in zip(block, pieces, strict=True)
                ]
                yield np.array([size for some in parts for size in some], np.int64), pieces

    count = sum(len(sizes) for sizes, _ in sequences())
    file.write(HEADER.pack(MAGIC, 1, code, count, documents + 1))
    for sizes, _ in sequences():
        file.write(sizes.astype("<i4").tobytes())
    at = 0
    for sizes, _ in sequences():
        ends = at + np.cumsum(sizes)
        file.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        at = int(ends[-1])
    file.write(struct.pack("<q", 0))
    at = 0
    for _, pieces in sequences():
        ends = at + np.cumsum(pieces)
        file.write(ends.astype("<i8").tobytes())
        at = int(ends[-1])
    file.flush()
