"""WKV5 against the sum it is, its one-decay-a-head form, and decays that forget everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heronry.ops.wkv5 import BODIES, wkv5

from .cases import BY_NAME, assert_close, assert_equals_reference, draw, run

OPERATOR = BY_NAME["wkv5"]


def sum_over_time(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each output as its own sum over all earlier tokens; the state as one sum over all."""
    tokens = r.shape[1]
    w = log_w.exp()
    ys = []
    for t in range(tokens):
        y = torch.einsum("bhvk,hk,bhk->bhv", state, w**t, r[:, t])
        for i in range(t):
            y = y + (r[:, t] * k[:, i] * w ** (t - 1 - i)).sum(-1, keepdim=True) * v[:, i]
        ys.append(y + (r[:, t] * k[:, t] * u).sum(-1, keepdim=True) * v[:, t])
    last = w[:, None] ** torch.arange(tokens - 1, -1, -1)[:, None]  # [H, T, N]
    final = state * (w**tokens)[:, None] + torch.einsum("bthv,bthk,htk->bhvk", v, k, last)
    return torch.stack(ys, dim=1), final


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_equals_a_sum_over_time(impl: str, tokens: int):
    arguments = draw(OPERATOR, 2, tokens, 3, 5)
    y, state = wkv5(**arguments, impl=impl)
    expected_y, expected_state = sum_over_time(**arguments)
    assert_close({"y": y, "state": state}, {"y": expected_y, "state": expected_state}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
def test_one_decay_and_bonus_a_head(impl: str):
    arguments = draw(OPERATOR, 2, 70, 3, 5)
    narrow = arguments | {"log_w": arguments["log_w"][:, :1], "u": arguments["u"][:, :1]}
    wide = narrow | {name: narrow[name].expand(3, 5) for name in ("log_w", "u")}
    actual, expected = run(OPERATOR, narrow, impl), run(OPERATOR, wide, "reference")
    for name in ("gradient of log_w", "gradient of u"):
        expected[name] = expected[name].sum(-1, keepdim=True)
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("log_w", [-1e-5, -8.0, -60.0])
def test_extreme_decays(impl: str, tokens: int, log_w: float):
    arguments = draw(OPERATOR, 1, tokens, 1, 4)
    arguments["log_w"] = torch.full_like(arguments["log_w"], log_w)
    assert_equals_reference(OPERATOR, arguments, impl)


def test_shapes_of_decay_and_bonus_are_named():
    arguments = draw(OPERATOR, 1, 5, 3, 4)
    for name in ("log_w", "u"):
        with pytest.raises(ValueError, match=rf"wkv5: {name} must have shape \[3, 4\] or \[3, 1\], got \[3, 2\]"):
            wkv5(**arguments | {name: arguments[name][:, :2]})
