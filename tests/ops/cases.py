"""What the tests of all operators share: inputs, one call with all its gradients, and how close is close."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heronry.ops.wkv4 import BODIES as WKV4
from heronry.ops.wkv4 import wkv4
from heronry.ops.wkv5 import BODIES as WKV5
from heronry.ops.wkv5 import wkv5
from heronry.ops.wkv6 import BODIES as WKV6
from heronry.ops.wkv6 import wkv6
from heronry.ops.wkv7 import BODIES as WKV7
from heronry.ops.wkv7 import wkv7

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Operator:
    name: str
    call: Callable[..., tuple[Tensor, Tensor]]
    draw: Callable[..., Arguments]  # (noise, batch, tokens, heads, size, states) -> arguments, state last
    bodies: tuple[str, ...]
    over_time: tuple[str, ...]  # the arguments with a time axis, for cutting sequences


def draw(operator: Operator, batch: int, tokens: int, heads: int, size: int, *, states: int = 0, seed: int = 0):
    """Arguments in float64, `states` initial states (batch of them by default)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return operator.draw(noise, batch, tokens, heads, size, states or batch)


def _draw4(noise: Callable[..., Tensor], batch: int, tokens: int, heads: int, size: int, states: int) -> Arguments:
    channels = heads * size
    a, b, p = noise(states, 3, channels).unbind(1)
    return {
        "log_w": -noise(channels).exp(),
        "k": 3 * noise(batch, tokens, channels),
        "v": noise(batch, tokens, channels),
        "u": noise(channels),
        "state": torch.stack([a, b.exp(), p], dim=1),  # B is a sum of weights: positive
    }


def _draw5(noise: Callable[..., Tensor], batch: int, tokens: int, heads: int, size: int, states: int) -> Arguments:
    return {
        "r": noise(batch, tokens, heads, size),
        "log_w": -noise(heads, size).exp(),
        "k": noise(batch, tokens, heads, size),
        "v": noise(batch, tokens, heads, size),
        "u": noise(heads, size),
        "state": noise(states, heads, size, size),
    }


def _draw6(noise: Callable[..., Tensor], batch: int, tokens: int, heads: int, size: int, states: int) -> Arguments:
    decay = -(2 * noise(batch, tokens, heads, size) - 1).exp()  # from keeping all to forgetting all
    return _draw5(noise, batch, tokens, heads, size, states) | {"log_w": decay}


def _draw7(noise: Callable[..., Tensor], batch: int, tokens: int, heads: int, size: int, states: int) -> Arguments:
    shape = (batch, tokens, heads, size)
    kappa = F.normalize(noise(*shape), dim=-1)
    return {
        "r": noise(*shape),
        "log_w": -0.6065306597 * noise(*shape).sigmoid(),
        "k": noise(*shape),
        "v": noise(*shape),
        "a": -kappa,
        "b": kappa * noise(*shape).sigmoid(),
        "state": noise(states, heads, size, size),
    }


OPERATORS = [
    Operator("wkv4", wkv4, _draw4, tuple(WKV4), ("k", "v")),
    Operator("wkv5", wkv5, _draw5, tuple(WKV5), ("r", "k", "v")),
    Operator("wkv6", wkv6, _draw6, tuple(WKV6), ("r", "log_w", "k", "v")),
    Operator("wkv7", wkv7, _draw7, tuple(WKV7), ("r", "log_w", "k", "v", "a", "b")),
]
BY_NAME = {operator.name: operator for operator in OPERATORS}


def to(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: x.to(dtype) for name, x in arguments.items()}


def cut(operator: Operator, arguments: Arguments, start: int, end: int, state: Tensor | None) -> Arguments:
    """The arguments for tokens start to end, beginning with `state`."""
    pieces = {name: x[:, start:end] if name in operator.over_time else x for name, x in arguments.items()}
    pieces.pop("state")
    return pieces if state is None else pieces | {"state": state}


def loss(y: Tensor, state: Tensor) -> Tensor:
    """A weighted sum of both, the weights fixed by the shapes, so that every number has its own gradient."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (y, state)]
    return (y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()


def run(
    operator: Operator, arguments: Arguments, impl: str, cu_seqlens: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Output, final state, and the gradient of `loss` for every argument, by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    y, state = operator.call(**leaves, cu_seqlens=cu_seqlens, impl=impl)
    gradients = torch.autograd.grad(loss(y, state), list(leaves.values()))
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "final state": state.detach()} | named


class Recorder(TorchDispatchMode):
    """Notes the calls of heronry's operators of torch: the operator and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "heronry":
            self.calls.append((function, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)))
        return function(*args, **kwargs or {})


def run_without_state(call: Callable[..., Tensor], arguments: Arguments, **options) -> dict[str, Tensor]:
    """As `run` for an operator without a state: its output, and the gradients of a sum of it."""
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    y = call(**leaves, **options)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # one or two tokens do not depend on the decay
    gradients = torch.autograd.grad(y, list(leaves.values()), weights.to(y.dtype), materialize_grads=True)
    return {"y": y.detach()} | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest number of its expectation (of 1 where that is smaller)."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        assert actual[name].isfinite().all(), f"{name} is not finite"
        error = (actual[name].double() - x.double()).abs().max() / x.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def assert_equals_reference(operator: Operator, arguments: Arguments, impl: str, float32: float = 2e-5) -> None:
    """What a body gives for arguments rounded to float32 is near the reference; in float32 within that tolerance."""
    arguments = to(to(arguments, torch.float32), torch.float64)
    expected = run(operator, arguments, "reference")
    assert_close(run(operator, arguments, impl), expected, 1e-10)
    assert_close(run(operator, to(arguments, torch.float32), impl), expected, float32)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads in the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_for_any_threads(call: Callable[[], dict[str, Tensor]]) -> None:
    """The number of threads does not change a bit of what `call` returns."""
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(call())
    for other in results[1:]:
        assert all(torch.equal(other[name], x) for name, x in results[0].items())
