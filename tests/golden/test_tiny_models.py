"""Three small trained models whose logits another implementation has published (rwkv.cpp)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import heronry

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"


@pytest.mark.parametrize(
    ("name", "ln_x_eps", "tolerance"),
    [
        ("tiny-rwkv-4v0-660K", None, 5e-6),
        ("tiny-rwkv-5v2-730K", 1e-5, 1e-5),  # its logits were made with this constant
        ("tiny-rwkv-7v0-834K", None, 5e-6),
    ],
)
@torch.inference_mode()
def test_logits(name, ln_x_eps, tolerance):
    if not REFERENCE.is_dir():
        pytest.skip(f"the reference models are not at {REFERENCE}")
    model = heronry.load(REFERENCE / f"{name}.pth", ln_x_eps=ln_x_eps)
    logits, _ = model(torch.tensor([list(b'"in')]), last_only=True)
    expected = torch.from_numpy(np.load(REFERENCE / f"{name}.expected_logits.npy"))
    assert (logits[0, 0] - expected).abs().max() <= tolerance
