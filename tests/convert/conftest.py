"""Weights to convert."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def weights(random_checkpoint):
    """Of every version, in the sizes that llama.cpp can read, and in numbers that float16 holds."""

    def made(version: str, **options) -> dict[str, torch.Tensor]:
        sizes = {"width": 128, "heads": 2, "ffn": 192, "rank": 32, "layers": 3} | options
        return {name: x.half().float() for name, x in random_checkpoint(version, **sizes).items()}

    return made
