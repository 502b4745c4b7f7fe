"""WKV6 against the sum it is, and with decays that no common factor survives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heronry.ops.wkv5 import wkv5
from heronry.ops.wkv6 import BODIES, wkv6

from .cases import BY_NAME, assert_close, assert_equals_reference, draw, run, to

OPERATOR = BY_NAME["wkv6"]


def sum_over_time(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each output as its own sum over all earlier tokens, every decay summed anew; the state likewise."""
    tokens = r.shape[1]

    def decay(start: int, end: int) -> Tensor:  # [B, H, N]
        return log_w[:, start:end].sum(1).exp()

    ys = []
    for t in range(tokens):
        y = ((state * decay(0, t)[..., None, :]) @ r[:, t, :, :, None])[..., 0]
        for i in range(t):
            y = y + (r[:, t] * k[:, i] * decay(i + 1, t)).sum(-1, keepdim=True) * v[:, i]
        ys.append(y + (r[:, t] * k[:, t] * u).sum(-1, keepdim=True) * v[:, t])
    final = state * decay(0, tokens)[..., None, :]
    for i in range(tokens):
        final = final + v[:, i, :, :, None] * (k[:, i] * decay(i + 1, tokens))[..., None, :]
    return torch.stack(ys, dim=1), final


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_equals_a_sum_over_time(impl: str, tokens: int):
    arguments = draw(OPERATOR, 2, tokens, 3, 5)
    y, state = wkv6(**arguments, impl=impl)
    expected_y, expected_state = sum_over_time(**arguments)
    assert_close({"y": y, "state": state}, {"y": expected_y, "state": expected_state}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
def test_constant_decay_is_wkv5(impl: str):
    arguments = draw(BY_NAME["wkv5"], 2, 70, 3, 5)
    y, state = wkv5(**arguments, impl="reference")
    repeated = arguments | {"log_w": arguments["log_w"].expand_as(arguments["r"])}
    actual_y, actual_state = wkv6(**repeated, impl=impl)
    assert_close({"y": actual_y, "state": actual_state}, {"y": y, "state": state}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("log_w", [-1e-5, -8.0, -60.0, -1e4])
def test_extreme_decays(impl: str, tokens: int, log_w: float):
    arguments = draw(OPERATOR, 1, tokens, 1, 4)
    arguments["log_w"] = torch.full_like(arguments["log_w"], log_w)
    assert_equals_reference(OPERATOR, arguments, impl)


@pytest.mark.parametrize("impl", BODIES)
def test_forgetting_tokens_among_keeping_ones(impl: str):
    """A long sum of -60s beside -0.01s: what is left after a subtraction of such sums has lost its digits."""
    arguments = draw(OPERATOR, 1, 200, 2, 4)
    forgets = arguments["r"] > 0.5
    arguments["log_w"] = torch.where(forgets, -60.0, -0.01).to(torch.float64)
    arguments = to(to(arguments, torch.float32), torch.float64)
    expected = run(OPERATOR, arguments, "reference")
    assert_close(run(OPERATOR, to(arguments, torch.float32), impl), expected, 2e-6)


@pytest.mark.parametrize("impl", BODIES)
def test_decay_to_exactly_zero(impl: str):
    arguments = draw(OPERATOR, 1, 70, 2, 3)
    arguments["log_w"][:, 20] = -torch.inf
    actual = run(OPERATOR, arguments, impl)
    assert_close(actual, run(OPERATOR, arguments, "reference"), 1e-10)
    y, state = wkv6(**arguments | {"state": arguments["state"] + 1}, impl=impl)
    assert torch.equal(y[:, 21:], actual["y"][:, 21:])  # nothing from before is left
    assert torch.equal(state, actual["final state"])


@pytest.mark.parametrize("impl", BODIES)
def test_extreme_decays_long(impl: str):
    arguments = draw(OPERATOR, 1, 4097, 1, 4)
    arguments["log_w"] = torch.full_like(arguments["log_w"], -8.0)
    arguments = to(arguments, torch.float32)
    y, state = wkv6(**to(arguments, torch.float64), impl="reference")
    actual_y, actual_state = wkv6(**arguments, impl=impl)
    assert_close({"y": actual_y, "state": actual_state}, {"y": y, "state": state}, 1e-6)
