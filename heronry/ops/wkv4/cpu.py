"""WKV4 in C++: cpu.cpp as a PyTorch operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..arguments import call
from ..dispatch import native_library, needs_gradients, select_entry_point

CHUNK = 16  # tokens from one saved state to the next


def cpu(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv4`; cu is the checked tuple of boundaries."""
    inputs = (log_w, k, v, u, state)
    keep = needs_gradients(inputs)
    y, final, _ = select_entry_point(forward, _forward, inputs)(*inputs, cu, keep)
    return y, final


def _forward(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and with `keep` the state before every CHUNK tokens."""
    outputs: tuple[Tensor, Tensor, Tensor] = _fake_forward(log_w, k, v, u, state, cu, keep)
    tensors = (log_w[None, None], k, v, u[None, None], state.contiguous(), *outputs)
    call(native_library("wkv4").wkv4_forward, tensors, cu, len(state), *k.shape[1:], CHUNK)
    return outputs


forward = torch.library.custom_op("heronry::wkv4", mutates_args=(), device_types="cpu")(_forward)


@forward.register_fake
def _fake_forward(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    batch, tokens, channels = k.shape
    chunks = 0
    if keep:
        lengths = [tokens] * batch if cu is None else [end - start for start, end in pairwise(cu)]
        chunks = sum(-(-length // CHUNK) for length in lengths)
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(chunks, 3, channels)


@torch.library.custom_op("heronry::wkv4_backward", mutates_args=(), device_types="cpu")
def backward(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    saved_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    cu: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of log_w, k, v, u and of the initial state."""
    dlog_w, dk, dv, du, dstate = _fake_backward(log_w, k, v, u, saved_states, dy, dfinal, cu)
    # one gradient a sequence, added in one order: the same for any number of threads
    dlog_w_parts, du_parts = dfinal.new_empty(2, len(dfinal), 1, k.shape[2])
    tensors = (log_w[None, None], k, v, u[None, None], saved_states, dy, dfinal.contiguous())
    gradients = (dlog_w_parts, dk, dv, du_parts, dstate)
    call(native_library("wkv4").wkv4_backward, (*tensors, *gradients), cu, len(dfinal), *k.shape[1:], CHUNK)
    dlog_w.copy_(dlog_w_parts.sum((0, 1)))
    du.copy_(du_parts.sum((0, 1)))
    return dlog_w, dk, dv, du, dstate


@backward.register_fake
def _fake_backward(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    saved_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    cu: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of the right shapes."""
    dlog_w, dk, dv, du = (x.new_empty(x.shape) for x in (log_w, k, v, u))
    return dlog_w, dk, dv, du, dfinal.new_empty(dfinal.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.cu, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _gradients(ctx: Any, dy: Tensor, dfinal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *backward(*ctx.saved_tensors, dy, dfinal, ctx.cu), None, None


forward.register_autograd(_gradients, setup_context=_save)
