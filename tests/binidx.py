"""Small token files, written after the description of the format and not with our writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_binidx(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """A .bin of uint16 and its .idx."""
    sizes = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.concatenate([np.asarray(document, dtype=np.uint16) for document in documents])
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 2
    ends = np.arange(len(sizes) + 1, dtype=np.int64)
    prefix.with_name(prefix.name + ".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + ends.tobytes())
    return prefix
