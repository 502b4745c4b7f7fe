"""RWKV World's tokenizer: at every position the longest token of rwkv_vocab_v20230424, in bytes.

- C++ encodes (world.cpp); without a compiled library Python does, with the same ids, some 40 times slower
- the vocabulary lies beside this file; rwkv_vocab_v20230424.md says where it comes from and how it is packed
"""

from __future__ import annotations

import ctypes
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

from .. import build
from .utf8 import ByteStream, encode_utf8

FILE = Path(__file__).with_name("rwkv_vocab_v20230424.bin")
COUNT = 65529  # tokens; their ids are 1 .. COUNT
SLOTS = 1 << 17  # of the double array in world.cpp; 116,079 are used
CAPACITY = 1 << 14  # ids that one native call returns


class WorldTokenizer:
    """RWKV World, rwkv_vocab_v20230424. Id 0 is the end of text."""

    stop_ids = frozenset({0})
    vocab_size = COUNT + 1

    def __init__(self) -> None:
        _find_encoder()  # takes some milliseconds the first time

    @property
    def vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of each id."""
        return read_vocabulary()

    def encode(self, text: str) -> list[int]:
        return _find_encoder()(encode_utf8(text))

    def decode(self, tokens: Iterable[int]) -> str:
        vocabulary = self.vocabulary
        pieces = (vocabulary[token] for token in tokens if 0 <= token < len(vocabulary))
        return b"".join(pieces).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream(self.vocabulary)


@cache
def read_vocabulary() -> tuple[bytes, ...]:
    """The bytes of each id; id 0 has none."""
    lengths, joined = read_file()
    return (b"", *(joined[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))))


def read_file() -> tuple[bytes, bytes]:
    """The length of each token from id 1 on, and the bytes of all tokens one after another."""
    data = zlib.decompress(FILE.read_bytes())
    return data[:COUNT], data[COUNT:]


@cache
def _find_encoder() -> Callable[[bytes], list[int]]:
    """The native encoder, or the one in Python where there is no compiled library (build.py logs a warning then)."""
    library = build.library(Path(__file__).with_suffix(".cpp"))
    return PythonEncoder(read_vocabulary()) if library is None else NativeEncoder(library, *read_file())


class NativeEncoder:
    """Bytes to ids in C++. Threads may share it; they encode at the same time."""

    def __init__(self, library: ctypes.CDLL, lengths: bytes, joined: bytes):
        """lengths, joined: the tokens as in `read_file`."""
        self._trie = (ctypes.c_uint64 * SLOTS)()
        build_trie = library.world_build
        build_trie.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
        if not build_trie(self._trie, SLOTS, joined, lengths, len(lengths)):
            raise ValueError(f"the vocabulary does not fit into {SLOTS} slots")
        self._encode = library.world_encode
        self._encode.restype = ctypes.c_int64
        self._encode.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_void_p,
            ctypes.c_int64,
        ]
        self._buffers: list[array[int]] = []  # those that no call is using

    def __call__(self, data: bytes) -> list[int]:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = array("H", bytes(2 * CAPACITY))
        tokens: list[int] = []
        position = ctypes.c_int64(0)
        while position.value < len(data):
            address = buffer.buffer_info()[0]
            count = self._encode(self._trie, data, len(data), position, address, CAPACITY)
            tokens += buffer[:count].tolist()
        self._buffers.append(buffer)
        return tokens


class PythonEncoder:
    """Bytes to ids in Python: the lengths of tokens that begin with the next two bytes are tried, the longest first."""

    def __init__(self, vocabulary: Sequence[bytes]):
        self._ids = {token: i for i, token in enumerate(vocabulary) if token}
        lengths: defaultdict[bytes, set[int]] = defaultdict(lambda: {1})
        for token in self._ids:
            lengths[token[:2]].add(len(token))
        self._lengths = {beginning: sorted(group, reverse=True) for beginning, group in lengths.items()}

    def __call__(self, data: bytes) -> list[int]:
        tokens = []
        position = 0
        while position < len(data):
            for length in self._lengths.get(data[position : position + 2], (1,)):
                piece = data[position : position + length]  # shorter at the end of the text
                if piece in self._ids:
                    break
            tokens.append(self._ids[piece])
            position += len(piece)
        return tokens
