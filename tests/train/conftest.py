"""Small token files, written after the description of the format and not with our writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


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


@pytest.fixture
def texts(tmp_path) -> Path:
    """60 documents of 1 to 40 tokens below 50, with something to learn: the next token is mostly the last one + 1."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        start, length = random.integers(50), random.integers(1, 41)
        noise = random.integers(0, 50, length) * (random.random(length) < 0.1)
        documents.append((start + np.arange(length) + noise) % 50)
    return write_binidx(tmp_path / "texts", documents)
