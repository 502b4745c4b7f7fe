"""WKV7 against the product of its transition matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heronry.ops.wkv7 import BODIES, wkv7

from .cases import BY_NAME, assert_close, assert_equals_reference, draw

OPERATOR = BY_NAME["wkv7"]


def product_of_transitions(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Each state from the initial one and every token's v k^T, through all transitions that follow."""
    tokens = r.shape[1]
    transition = torch.diag_embed(log_w.exp()) + a[..., :, None] * b[..., None, :]  # [B, T, H, N, N]

    def through(start: int, end: int) -> Tensor:
        product = torch.eye(r.shape[-1], dtype=r.dtype)
        for t in range(start, end):
            product = product @ transition[:, t]
        return product

    states = []
    for t in range(tokens):
        s = state @ through(0, t + 1)
        for i in range(t + 1):
            s = s + (v[:, i, :, :, None] * k[:, i, :, None, :]) @ through(i + 1, t + 1)
        states.append(s)
    y = torch.stack([(s @ r[:, t, :, :, None])[..., 0] for t, s in enumerate(states)], dim=1)
    return y, states[-1]


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 36])
def test_equals_a_product_of_transitions(impl: str, tokens: int):
    arguments = draw(OPERATOR, 2, tokens, 2, 3)
    y, state = wkv7(**arguments, impl=impl)
    expected_y, expected_state = product_of_transitions(**arguments)
    assert_close({"y": y, "state": state}, {"y": expected_y, "state": expected_state}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("log_w", [-0.6065306597, 0.0])
def test_ends_of_the_decay_range(impl: str, log_w: float):
    arguments = draw(OPERATOR, 1, 300, 1, 8)
    arguments["log_w"] = torch.full_like(arguments["log_w"], log_w)
    assert_equals_reference(OPERATOR, arguments, impl, float32=1e-4)


@pytest.mark.parametrize("impl", BODIES)
def test_a_key_written_twice_holds_the_second_value(impl: str):
    """The delta rule with full learning rate and no decay: what a key held is erased before it is written."""
    key = torch.eye(4, dtype=torch.float64)[[0, 1, 0]][None, :, None]  # [1, 3, 1, 4], the first key comes again
    v = torch.arange(12, dtype=torch.float64).reshape(1, 3, 1, 4)
    y, state = wkv7(key, torch.zeros_like(key), key, v, -key, key, impl=impl)
    assert_close({"y": y}, {"y": v}, 1e-12)
    assert_close({"state": state[0, 0, :, :2]}, {"state": torch.stack([v[0, 2, 0], v[0, 1, 0]], dim=1)}, 1e-12)
