"""Packs BlinkDL's rwkv_vocab_v20230424.txt into the file that world.py reads.

python -m heronry.text.pack_world_vocabulary rwkv_vocab_v20230424.txt
"""

from __future__ import annotations

import ast
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from .world import COUNT, FILE


def pack(text: str) -> bytes:
    """The lengths of tokens 1 .. COUNT, a byte each, and then their bytes, compressed by zlib.

    A line of `text` is an id, a Python literal (str or bytes) and its length in bytes.
    """
    tokens: dict[int, bytes] = {}
    for line in text.rstrip("\n").split("\n"):
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal)
        token = value.encode() if isinstance(value, str) else value
        if len(token) != int(length):
            raise ValueError(f"token {number} has {len(token)} bytes, but its line says {length}")
        tokens[int(number)] = token
    in_order = [tokens[number] for number in range(1, COUNT + 1)]
    return zlib.compress(bytes(map(len, in_order)) + b"".join(in_order), 9)


def vocabulary_text(vocabulary: Sequence[bytes]) -> str:
    """The content of BlinkDL's file for a vocabulary, in which id 0 has no bytes."""
    lines = []
    for number, token in enumerate(vocabulary[1:], 1):
        try:
            literal = repr(token.decode())
        except UnicodeDecodeError:
            literal = repr(token)
        lines.append(f"{number} {literal} {len(token)}\n")
    return "".join(lines)


if __name__ == "__main__":
    FILE.write_bytes(pack(Path(sys.argv[1]).read_text(encoding="utf-8")))
