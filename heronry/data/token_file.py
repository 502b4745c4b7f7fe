"""Token files: documents as token ids on disk, memory-mapped rather than loaded.

- the format is the pair PREFIX.bin and PREFIX.idx ("binidx") of Megatron and RWKV-LM, whose files can be read too
- heronry adds two files: PREFIX.mask, a byte per token (1: its prediction counts in the loss), only if some tokens do
  not count; and PREFIX.json: tokenizer, vocabulary size, id of the end of text, number of documents and tokens
- the index, all numbers little-endian: b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype of the ids, uint64 sequences S,
  uint64 length of the last table; int32 [S] tokens of each sequence, int64 [S] byte of .bin where each begins,
  int64 [D + 1] first sequence of each document, and S
- a writer can tell at any time how much of its files is safely on disk, so that a killed run can resume from there
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
from numpy.typing import NDArray

from ..errors import InputError
from ..files import read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, length of the table of documents
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MAX_SEQUENCE = 2**31 - 1  # tokens; a longer document is several sequences
BLOCK = 1 << 20  # numbers that are processed at a time, as all of them may not fit in memory


class TokenFile:
    """A memory-mapped token file.

    Attributes:
        prefix: its path without a suffix.
        tokens: np.memmap [N], of the integer type in the file.
        offsets: int64 [D + 1]; document d is tokens[offsets[d] : offsets[d + 1]]. `len()` is D.
        mask: np.memmap uint8 [N], 1 where the prediction of that token counts in the loss; None: all count.
        metadata: the content of PREFIX.json; {} without it.
        vocab_size: that of the tokenizer; without PREFIX.json the largest id + 1.
        end_of_text: the id in front of every document: the one that ends texts, or 0 if there is none.
        tokenizer: for `load_tokenizer`: "bytes", "world" or the path of a tokenizer.json; None: unknown.
        notes: for the config.json of a model trained on this file (see `heronry.save`).
    """

    def __init__(self, prefix: str | Path):
        """
        Args:
            prefix: its path, with or without .bin, .idx or .json.

        Raises:
            InputError: a missing, damaged or truncated file, files that contradict each other, no tokens.
        """
        self.prefix = strip_suffix(prefix)
        data, index = prefix_file(self.prefix, ".bin"), prefix_file(self.prefix, ".idx")
        if not data.is_file() and not index.is_file():
            path = Path(prefix).expanduser()
            if path.exists():
                raise InputError(
                    f"{path}: is not a token file; `heronry data {path} -o {path.stem}-tokens` makes one of texts"
                )
            raise InputError(f"{data}: no such file; `heronry data` makes token files of texts")
        for path, other in ((data, index), (index, data)):
            if not path.is_file():
                raise InputError(f"{path}: no such file, although {other.name} exists")
        dtype, self.offsets = _read_index(index)
        count = int(self.offsets[-1])
        size = data.stat().st_size
        if size != count * dtype.itemsize:
            problem = "truncated" if size < count * dtype.itemsize else "too long"
            raise InputError(f"{data}: {problem}: {size} bytes, expected {count * dtype.itemsize} from {index.name}")
        if not count:
            raise InputError(f"{data}: contains no tokens")
        self.tokens = np.memmap(data, dtype, "r")
        self.mask = self._read_mask(count)
        self.metadata = self._read_metadata(count)
        self.end_of_text: int = self.metadata.get("end_of_text") or 0
        name = self.metadata.get("tokenizer")
        self.tokenizer: str | Path | None = name if name in ("bytes", "world", None) else self._find_tokenizer(name)
        # in training every document follows this id (see batching.py), so inference should start with it too
        self.notes: dict[str, Any] = {"opening_tokens": [self.end_of_text]}
        if self.metadata.get("template"):
            self.notes["chat_template"] = self.metadata["template"]

    @cached_property
    def vocab_size(self) -> int:
        if vocab_size := self.metadata.get("vocab_size"):
            return int(vocab_size)
        blocks = (self.tokens[start : start + BLOCK] for start in range(0, len(self.tokens), BLOCK))
        return 1 + max(int(block.max()) for block in blocks)

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json beside the token file, if it was encoded with one."""
        return self.tokenizer if isinstance(self.tokenizer, Path) else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, d: int) -> NDArray[Any]:
        """The ids of document d, including the end of text; a view."""
        return self.tokens[self.offsets[d] : self.offsets[d + 1]]

    def _find_tokenizer(self, name: str) -> Path:
        """The file of this name beside the token file. It will be copied into the folder of a model, so no other place
        is searched: who sends a token file shall not choose which file of this machine gets published."""
        file = self.prefix.parent / name
        description = prefix_file(self.prefix, ".json")
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise InputError(
                f"{description}: tokenizer must be bytes, world or the name of a file beside it, got {name!r}"
            )
        if not file.is_file():
            raise InputError(f"{description}: its tokenizer {name} is not beside it")
        return file

    def _read_mask(self, count: int) -> NDArray[Any] | None:
        path = prefix_file(self.prefix, ".mask")
        if not path.is_file():
            return None
        if path.stat().st_size != count:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected {count}, one for each token")
        return np.memmap(path, np.uint8, "r")

    def _read_metadata(self, count: int) -> dict[str, Any]:
        """The content of PREFIX.json, checked against the other files. count: of tokens."""
        path = prefix_file(self.prefix, ".json")
        if not path.is_file():
            return {}
        try:
            metadata = read_json(path)
        except InputError as error:
            raise InputError(f"{path.parent}: {error}") from error
        for key, least in (("vocab_size", 1), ("end_of_text", 0)):
            value = metadata.get(key)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{path}: {key} must be a whole number of at least {least}, got {value!r}")
        for key in ("tokenizer", "template"):
            if not isinstance(metadata.get(key), str | None):
                raise InputError(f"{path}: {key} must be a string, got {metadata[key]!r}")
        for key, actual in (("tokens", count), ("documents", len(self))):
            if metadata.get(key, actual) != actual:
                raise InputError(f"{path}: says {metadata[key]} {key}, but the token file has {actual}")
        return metadata


@dataclass(frozen=True)
class Written:
    """How much a writer has written."""

    tokens: int = 0
    documents: int = 0  # complete ones
    open_tokens: int = 0  # of the document that is not complete yet
    masked: bool = False  # whether some token does not count in the loss


class TokenWriter:
    """Writes a token file piece by piece, in constant memory.

    Everything goes to *.part files, which `finish` renames. Its two halves, `seal` and `publish_parts`, are for callers
    that record their progress.
    """

    def __init__(self, prefix: str | Path, dtype: str, written: Written | None = None):
        """
        Args:
            prefix: its path, with or without .bin, .idx or .json.
            dtype: of the ids: "uint16", "int32", or another of DTYPES.
            written: the result of an earlier `flush`, to resume from there; anything after it is cut off.

        Raises:
            InputError: the .part files are shorter than that.
        """
        self.prefix, self.dtype = strip_suffix(prefix), np.dtype(dtype).newbyteorder("<")
        self.written = written or Written()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._ids = self._open(".bin", self.written.tokens * self.dtype.itemsize)
        self._sizes = self._open(".sizes", self.written.documents * 8)  # int64 a document
        self._mask = self._open(".mask", self.written.tokens) if self.written.masked else None

    def _open(self, suffix: str, size: int) -> BinaryIO:
        """The .part file, cut to its first `size` bytes and open for appending."""
        path = part_file(self.prefix, suffix)
        if size and (not path.is_file() or path.stat().st_size < size):
            raise InputError(f"{path}: shorter than recorded; start over with --restart")
        file = open(path, "r+b" if size else "wb")  # noqa: SIM115  closed by `seal` or `close`
        file.truncate(size)
        file.seek(size)
        return file

    def write(self, ids: NDArray[Any], mask: NDArray[Any] | None = None, ends: bool = True) -> None:
        """Appends to the current document.

        Args:
            ids: integers [n] that fit the dtype.
            mask: [n], 1 or True where the prediction of the token counts in the loss; None: everywhere.
            ends: whether the document ends here.
        """
        before = self.written
        masked = before.masked
        if mask is not None and self._mask is None and not np.all(mask):
            self._mask, masked = self._open(".mask", 0), True
            for start in range(0, before.tokens, BLOCK):  # until now all tokens counted
                self._mask.write(b"\x01" * min(BLOCK, before.tokens - start))
        self._ids.write(ids.astype(self.dtype, copy=False).tobytes())
        if self._mask is not None:
            counts = np.ones(len(ids), np.uint8) if mask is None else mask.astype(np.uint8)
            self._mask.write(counts.tobytes())
        open_tokens = before.open_tokens + len(ids)
        if ends:
            self._sizes.write(struct.pack("<q", open_tokens))
        tokens, documents = before.tokens + len(ids), before.documents + ends
        self.written = Written(tokens, documents, 0 if ends else open_tokens, masked)

    def flush(self) -> Written:
        """Makes sure that everything is on disk, even after a power cut; returns how much that is."""
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
        return self.written

    def close(self) -> None:
        """Closes the files; the .part files stay."""
        for file in self._files():
            file.close()

    def _files(self) -> list[BinaryIO]:
        return [file for file in (self._ids, self._sizes, self._mask) if file is not None and not file.closed]

    def seal(self, metadata: dict[str, Any]) -> None:
        """Writes the index and PREFIX.json, still as .part files.

        metadata: for PREFIX.json; the numbers of documents and tokens are added.
        """
        if self.written.open_tokens or not self.written.tokens:
            raise ValueError("a token file must end with the end of a document")
        self.flush()
        self.close()
        with open(part_file(self.prefix, ".idx"), "wb") as file:
            _write_index(file, self.dtype, self.written.documents, self._lengths)
            os.fsync(file.fileno())
        metadata = metadata | {"documents": self.written.documents, "tokens": self.written.tokens}
        with open(part_file(self.prefix, ".json"), "w", encoding="utf-8") as text:
            text.write(json.dumps(metadata, indent=2) + "\n")  # in ASCII, as names of files may hold any bytes
            text.flush()
            os.fsync(text.fileno())

    def _lengths(self) -> Iterator[NDArray[Any]]:
        """The tokens of each document, int64, block by block."""
        with open(part_file(self.prefix, ".sizes"), "rb") as file:
            while len(lengths := np.fromfile(file, "<i8", BLOCK)):
                yield lengths

    def finish(self, metadata: dict[str, Any]) -> None:
        """Completes the token file. A .bin is never beside an index that belongs to another one.

        metadata: for PREFIX.json; the numbers of documents and tokens are added.
        """
        self.seal(metadata)
        publish_parts(self.prefix, self.written.masked)


def publish_parts(prefix: Path, masked: bool) -> None:
    """Renames the .part files of a sealed writer, the index last; can safely be repeated after a crash."""
    index = part_file(prefix, ".idx")
    if not index.is_file():
        return  # an earlier call completed
    prefix_file(prefix, ".idx").unlink(missing_ok=True)
    if not masked:
        prefix_file(prefix, ".mask").unlink(missing_ok=True)
    for suffix in (".bin", ".mask", ".json"):
        if part_file(prefix, suffix).is_file() and (masked or suffix != ".mask"):
            os.replace(part_file(prefix, suffix), prefix_file(prefix, suffix))
    os.replace(index, prefix_file(prefix, ".idx"))
    discard_parts(prefix)


def discard_parts(prefix: Path) -> None:
    """Deletes the .part files of a writer."""
    for suffix in (".bin", ".mask", ".json", ".idx", ".sizes"):
        part_file(prefix, suffix).unlink(missing_ok=True)


def strip_suffix(path: str | Path) -> Path:
    """PREFIX, given it or the name of a file: PREFIX.bin, .idx or .json."""
    path = Path(path).expanduser()
    if path.name in ("", ".."):
        raise InputError(f"{path}: is a folder; give the name of a token file")
    return path.with_suffix("") if path.suffix in (".bin", ".idx", ".json") else path


def prefix_file(prefix: Path, suffix: str) -> Path:
    """PREFIX with a suffix; the prefix itself may contain dots."""
    return prefix.with_name(prefix.name + suffix)


def part_file(prefix: Path, suffix: str) -> Path:
    """The name of a file while it is being written."""
    return prefix_file(prefix, suffix + ".part")


def _read_index(path: Path) -> tuple[np.dtype[Any], NDArray[Any]]:
    """The dtype of the ids, and the offsets of the documents, int64 [D + 1]."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise InputError(f"{path}: not an index of a token file (it does not begin with MMIDIDX)")
        if len(header) < HEADER.size:
            raise InputError(f"{path}: truncated")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != 1 or code not in DTYPES:
            raise InputError(
                f"{path}: unsupported version {version} with ids of type {code}; expected version 1 with integers"
            )
        if size != HEADER.size + 12 * sequences + 8 * documents:
            problem = "truncated" if size < HEADER.size + 12 * sequences + 8 * documents else "too long"
            raise InputError(f"{path}: {problem} for {sequences} sequences")
        sizes = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        first = np.fromfile(file, "<i8", documents)
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    ends = np.zeros(sequences + 1, np.int64)
    np.cumsum(sizes, dtype=np.int64, out=ends[1:])
    if (sizes < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise InputError(f"{path}: damaged: its sequences are not consecutive")
    if not documents or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
        raise InputError(f"{path}: damaged: its documents do not consist of its sequences")
    return dtype, ends[first]


def _write_index(
    file: BinaryIO, dtype: np.dtype[Any], documents: int, lengths: Callable[[], Iterator[NDArray[Any]]]
) -> None:
    """Writes an index. lengths: returns the tokens of each document, block by block; it is called several times."""
    code = next(code for code, name in DTYPES.items() if name == dtype.name)

    def sequences() -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """For each block: the tokens of each sequence, and the sequences of each document."""
        for block in lengths():
            counts = np.maximum(1, -(-block // MAX_SEQUENCE))
            if counts.max() == 1:
                yield block, counts
            else:
                sizes: list[int] = []
                for size, n in zip(block.tolist(), counts.tolist(), strict=True):
                    sizes += [MAX_SEQUENCE] * (n - 1) + [size - MAX_SEQUENCE * (n - 1)]
                yield np.array(sizes, np.int64), counts

    count = sum(len(sizes) for sizes, _ in sequences())
    file.write(HEADER.pack(MAGIC, 1, code, count, documents + 1))
    for sizes, _ in sequences():
        file.write(sizes.astype("<i4").tobytes())
    total = 0
    for sizes, _ in sequences():
        ends = total + np.cumsum(sizes)
        file.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        total = int(ends[-1])
    file.write(struct.pack("<q", 0))
    total = 0
    for _, counts in sequences():
        ends = total + np.cumsum(counts)
        file.write(ends.astype("<i8").tobytes())
        total = int(ends[-1])
    file.flush()
