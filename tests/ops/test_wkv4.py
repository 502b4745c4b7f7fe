"""WKV4 against the softmax it equals, with the keys and decays that make naive sums overflow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heronry.ops.wkv4 import BODIES, wkv4

from .cases import BY_NAME, assert_close, assert_equals_reference, draw, run, to

OPERATOR = BY_NAME["wkv4"]


def softmax_over_time(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """Every token's weights over all earlier ones and itself, one softmax a channel."""
    tokens = k.shape[1]
    t = torch.arange(tokens)
    age = (t[:, None] - 1 - t[None, :]).to(k.dtype)  # the previous token has not decayed yet
    exponent = age[:, :, None] * log_w + k[:, None]  # [B, T, T, A]
    exponent = torch.where((age == -1)[:, :, None], (u + k)[:, None], exponent)
    weights = exponent.masked_fill((age < -1)[:, :, None], -torch.inf).softmax(2)
    return (weights * v[:, None]).sum(2)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 50])
def test_equals_a_softmax_over_time(impl: str, tokens: int):
    arguments = draw(OPERATOR, 2, tokens, 1, 6)
    arguments.pop("state")
    y, _ = wkv4(**arguments, impl=impl)
    assert_close({"y": y}, {"y": softmax_over_time(**arguments)}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
def test_final_state_holds_the_sums(impl: str):
    arguments = draw(OPERATOR, 2, 50, 1, 6)
    arguments.pop("state")
    _, state = wkv4(**arguments, impl=impl)
    a, b, p = state.unbind(1)
    age = torch.arange(49, -1, -1)[:, None]
    exponent = arguments["k"] + age * arguments["log_w"]
    expected = {"A": (exponent.exp() * arguments["v"]).sum(1), "B": exponent.exp().sum(1), "p": exponent.amax(1)}
    assert_close({"A": a * p.exp(), "B": b * p.exp(), "p": p}, expected, 1e-12)


def wkv4_without_unit(*args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The final state as A / B and log B: p is near 60 here, and its own rounding is nobody's error."""
    y, state = wkv4(*args, **kwargs)
    a, b, p = state.unbind(1)
    return y, torch.stack([a / b, b.log() + p], dim=1)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("log_w", [-1e-4, -1.0, -20.0])
def test_huge_keys(impl: str, tokens: int, log_w: float):
    operator = replace(OPERATOR, call=wkv4_without_unit)
    arguments = draw(operator, 1, tokens, 1, 8)
    arguments["k"] = 60 * arguments["k"].sign() + arguments["v"].round()
    arguments["log_w"] = torch.full_like(arguments["log_w"], log_w)
    assert_equals_reference(operator, arguments, impl)


@pytest.mark.parametrize("impl", BODIES)
def test_slow_decay_keeps_its_digits_beside_a_large_key(impl: str):
    """The last token weighs as much as the first: what is left of the first shows every error of its decay."""
    tokens = 1000
    log_w = -torch.logspace(-5, -3, 16)
    k = torch.full((1, tokens, 16), -60.0)
    k[:, [0, -1]] = 60
    v = torch.zeros_like(k)
    v[:, 0] = 1
    y, _ = wkv4(log_w, k, v, torch.zeros(16), impl=impl)
    tolerance = 1e-6 if impl == "chunked" else 2e-5  # one rounding a chunk, or one a token
    assert_close({"y": y[0, -1].double()}, {"y": (log_w.double() * (tokens - 2)).sigmoid()}, tolerance)


@pytest.mark.parametrize("impl", BODIES)
def test_huge_keys_long(impl: str):
    arguments = draw(OPERATOR, 1, 4097, 1, 4)
    arguments["k"] = 60 * arguments["k"].sign() + arguments["v"]
    arguments["log_w"] *= 1e-3
    arguments = to(arguments, torch.float32)
    y, state = wkv4_without_unit(**to(arguments, torch.float64), impl="reference")
    actual_y, actual_state = wkv4_without_unit(**arguments, impl=impl)
    assert_close({"y": actual_y, "state": actual_state}, {"y": y, "state": state}, 1e-5)


@pytest.mark.parametrize("impl", BODIES)
def test_first_token_without_state_returns_its_value(impl: str):
    v = torch.tensor([[[3.0, -2.0]]])
    k = torch.tensor([[[-60.0, 60.0]]])
    y, state = wkv4(-torch.ones(2), k, v, torch.zeros(2), impl=impl)
    assert torch.equal(y, v)
    assert torch.equal(state, torch.stack([v[:, 0], torch.ones(1, 2), k[:, 0]], dim=1))


@pytest.mark.parametrize("impl", BODIES)
def test_equal_keys_have_finite_gradients(impl: str):
    """Ties of the maximum, and none of the state's weights: where 0/0 and inf - inf lurk."""
    arguments = draw(OPERATOR, 1, 40, 1, 4)
    arguments["k"] = torch.zeros_like(arguments["k"])
    arguments["log_w"] = torch.zeros_like(arguments["log_w"])
    arguments["state"] = torch.tensor([0.0, 0.0, -1e38], dtype=torch.float64)[:, None].expand(1, 3, 4)
    actual = run(OPERATOR, arguments, impl)
    assert_close(actual, run(OPERATOR, arguments, "reference"), 1e-10)
    mean = arguments["v"].cumsum(1) - arguments["v"] + arguments["u"].exp() * arguments["v"]
    mean = mean / (torch.arange(40)[:, None] + arguments["u"].exp())
    assert_close({"y": actual["y"]}, {"y": mean}, 1e-12)


@pytest.mark.parametrize("impl", BODIES)
@pytest.mark.parametrize("shift", [-50.0, 50.0])
def test_the_unit_of_the_initial_state_is_free(impl: str, shift: float):
    """(a, b, p) and (a e^-s, b e^-s, p + s) are the same sums, and p's gradient is what that implies."""
    arguments = draw(OPERATOR, 2, 40, 1, 4)
    actual = run(OPERATOR, arguments, impl)
    a, b, p = arguments["state"].unbind(1)
    scale = torch.tensor(-shift, dtype=torch.float64).exp()
    moved = run(OPERATOR, arguments | {"state": torch.stack([a * scale, b * scale, p + shift], dim=1)}, impl)
    assert_close({"y": moved["y"]}, {"y": actual["y"]}, 1e-11)
    da, db, dp = actual["gradient of state"].unbind(1)
    assert_close({"dp": dp}, {"dp": a * da + b * db}, 1e-12)
