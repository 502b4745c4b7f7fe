"""Selects which body of an operator runs, and has the checks that all operators share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import build
from .recording import record

log = logging.getLogger("heronry.ops")

Function = TypeVar("Function", bound=Callable[..., Any])
Output = TypeVar("Output")

MAX_LOOP_TOKENS = 4  # up to this many tokens the plain loop costs less than cutting chunks


def assume_constant_result(function: Function) -> Function:
    """torch.compiler.assume_constant_result, without the second and the 70 MB that importing the compiler takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def select_body(
    operator: str, impl: str, bodies: Mapping[str, Callable[..., Output]], max_tokens: int, device: torch.device
) -> Callable[..., Output]:
    """The body for `impl`; "auto" takes the fastest for sequences of at most `max_tokens` tokens."""
    auto = impl == "auto"
    if auto:
        if device.type == "cpu" and has_native_body(operator):
            impl = "cpu"
        else:
            impl = "reference" if max_tokens <= MAX_LOOP_TOKENS else "chunked"
        if not torch.compiler.is_compiling():
            _log_once(operator, impl)
    if impl not in bodies:
        raise ValueError(f"{operator} has no body {impl!r}; choose one of auto, {', '.join(bodies)}")
    if impl == "cpu" and device.type != "cpu":
        raise ValueError(f"{operator}: the body 'cpu' cannot run on {device}")
    if impl == "cpu" and not has_native_body(operator):
        raise ValueError(f"{operator}: the body 'cpu' needs a C++ compiler (g++ or clang++)")
    return partial(_run_body, operator, impl, bodies["chunked"] if auto else None, bodies[impl])


@cache
def source(operator: str) -> Path:
    """The C++ of an operator. WKV5 is WKV6 with the same decay at every token."""
    return Path(__file__).parent / ("wkv6" if operator == "wkv5" else operator) / "cpu.cpp"


def native_library(operator: str) -> build.Library:
    """The compiled C++ of an operator for which `has_native_body` is true."""
    library = build.library(source(operator))
    assert library is not None
    return library


@assume_constant_result
def has_native_body(operator: str) -> bool:
    """Whether the operator's C++ can be loaded; the first call may compile it."""
    return build.library(source(operator)) is not None


def needs_gradients(inputs: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def has_tangents(inputs: Iterable[Tensor]) -> bool:
    """Whether forward-mode differentiation goes through any of these tensors, which no_grad does not end."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def select_entry_point(
    operator: Callable[..., Output], plain: Callable[..., Output], inputs: Iterable[Tensor]
) -> Callable[..., Output]:
    """`operator`, registered with torch, where autograd, a compiler or tensor subclasses must see it; else `plain`, the
    function that it wraps. The registered one takes longer to call, and its first call imports the compiler, 70 MB.
    """
    seen = needs_gradients(inputs) or torch.compiler.is_compiling()
    return operator if seen or any(type(x) not in (Tensor, Parameter) for x in inputs) else plain


def _run_body(
    operator: str, impl: str, differentiable: Callable[..., Output] | None, body: Callable[..., Output], *args: Any
) -> Output:
    """body(*args) without autocast, which would round the state and, in float16, overflow the factors of chunks.

    differentiable: the body to take instead of C++ where forward-mode differentiation, which it knows nothing of, goes
        through the tensors.

    Raises:
        ValueError: the tensors are not all on one device, or have tangents that the body would lose.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    check_devices(operator, *tensors)
    if impl == "cpu" and not torch.compiler.is_compiling() and has_tangents(tensors):
        if differentiable is None:
            raise ValueError(f"{operator}: the body 'cpu' has no forward-mode derivative; choose chunked")
        body = differentiable
    device = args[0].device.type
    off = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if off else nullcontext():
        output = body(*args)
    if not torch.compiler.is_compiling():
        record(operator, args, output)
    return output


@cache
def _log_once(operator: str, impl: str) -> None:
    log.info("%s: impl=auto runs the %s body", operator, impl)


def longest_sequence(tokens: int, cu: tuple[int, ...] | None) -> int:
    """The length of the longest sequence. Packed ones count as long: the body that reads a sequence, and with it the
    last bits of its state, must not depend on the other sequences in the pack."""
    return tokens if cu is None else max(tokens, MAX_LOOP_TOKENS + 1)


def check_devices(operator: str, *tensors: Tensor) -> None:
    """ValueError unless all tensors are on one device."""
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            raise ValueError(f"{operator}: all tensors must be on one device, got {device} and {x.device}")


def check_sizes(operator: str, name: str, x: Tensor, letters: str) -> tuple[int, ...]:
    """Returns the sizes of `x`; ValueError unless it is floating point, has these dimensions and is not empty."""
    if x.ndim != len(letters) or 0 in x.shape:
        raise ValueError(f"{operator}: {name} must have shape [{', '.join(letters)}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{operator}: {name} must be floating point, got {x.dtype}")
    return tuple(x.shape)


def check_shape(operator: str, name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """ValueError unless `x` is floating point and has one of these shapes."""
    if tuple(x.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{operator}: {name} must have shape {expected}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{operator}: {name} must be floating point, got {x.dtype}")


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype a state is held in: float32, or float64 for float64 activations."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
