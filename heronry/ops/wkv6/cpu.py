"""WKV6 in C++: cpu.cpp as a PyTorch operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import call
from ..custom_op import count_chunks, empty_gradients, register_backward
from ..dispatch import native_library, needs_gradients, select_entry_point

CHUNK = 32  # tokens from one saved state to the next


def cpu(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv6`; cu is the checked tuple of boundaries. log_w may also be [H, N], the same at every token."""
    inputs = (r, log_w, k, v, u, state)
    keep = needs_gradients(inputs)
    y, final, _ = select_entry_point(forward, _forward, inputs)(*inputs, cu, keep)
    return y, final


def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and with `keep` the state before every CHUNK tokens."""
    outputs: tuple[Tensor, Tensor, Tensor] = _fake_forward(r, log_w, k, v, u, state, cu, keep)
    tensors = (r, log_w.expand(r.shape), k, v, u[None, None], state.contiguous(), *outputs)
    call(native_library("wkv6").wkv6_forward, tensors, cu, len(state), *r.shape[1:], CHUNK)
    return outputs


forward = torch.library.custom_op("heronry::wkv6", mutates_args=(), device_types="cpu")(_forward)


@forward.register_fake
def _fake_forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    batch, tokens, heads, size = r.shape
    chunks = count_chunks(batch, tokens, cu, CHUNK) if keep else 0
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(chunks, heads, size, size)


@torch.library.custom_op("heronry::wkv6_backward", mutates_args=(), device_types="cpu")
def backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    saved_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    cu: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, log_w, k, v, u and of the initial state."""
    constant = log_w.ndim == 2
    dr, dlog_w, dk, dv, du, dstate = empty_gradients(r, log_w, k, v, u, saved_states, dy, dfinal, cu)
    # gradients of what all tokens share: one per sequence, summed in a fixed order, the same for any number of threads
    du_parts = dfinal.new_empty(len(dfinal), 1, *u.shape)
    dlog_w_parts = torch.empty_like(du_parts) if constant else dlog_w
    tensors = (r, log_w.expand(r.shape), k, v, u[None, None], saved_states, dy, dfinal.contiguous())
    gradients = (dr, dlog_w_parts, dk, dv, du_parts, dstate)
    call(native_library("wkv6").wkv6_backward, (*tensors, *gradients), cu, len(dfinal), *r.shape[1:], CHUNK, constant)
    du.copy_(du_parts.sum((0, 1)))
    if constant:
        dlog_w.copy_(dlog_w_parts.sum((0, 1)))
    return dr, dlog_w, dk, dv, du, dstate


register_backward(forward, backward)
