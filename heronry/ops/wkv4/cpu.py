"""WKV4 in C++: cpu.cpp as a PyTorch operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import call
from ..custom_op import count_chunks, empty_gradients, register_backward
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
    chunks = count_chunks(batch, tokens, cu, CHUNK) if keep else 0
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
    dlog_w, dk, dv, du, dstate = empty_gradients(log_w, k, v, u, saved_states, dy, dfinal, cu)
    # one gradient per sequence, summed in a fixed order: the same for any number of threads
    dlog_w_parts, du_parts = dfinal.new_empty(2, len(dfinal), 1, k.shape[2])
    tensors = (log_w[None, None], k, v, u[None, None], saved_states, dy, dfinal.contiguous())
    gradients = (dlog_w_parts, dk, dv, du_parts, dstate)
    call(native_library("wkv4").wkv4_backward, (*tensors, *gradients), cu, len(dfinal), *k.shape[1:], CHUNK)
    dlog_w.copy_(dlog_w_parts.sum((0, 1)))
    du.copy_(du_parts.sum((0, 1)))
    return dlog_w, dk, dv, du, dstate


register_backward(forward, backward)
