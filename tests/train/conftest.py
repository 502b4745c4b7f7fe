"""What the tests of training learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from binidx import write_binidx


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """60 documents of 1 to 40 tokens below 50, with something to learn: the next token is mostly the last one + 1."""
    random = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        start, length = random.integers(50), random.integers(1, 41)
        noise = random.integers(0, 50, length) * (random.random(length) < 0.1)
        documents.append((start + np.arange(length) + noise) % 50)
    return write_binidx(tmp_path_factory.mktemp("texts") / "texts", documents)
