"""WKV7 in C++: cpu.cpp as a PyTorch operator with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import call
from ..custom_op import empty_gradients, register_backward
from ..dispatch import native_library, needs_gradients, select_entry_point

CHUNK = 32  # tokens from one saved state to the next


def cpu(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv7`; cu is the checked tuple of boundaries."""
    inputs = (r, log_w, k, v, a, b, state)
    keep = needs_gradients(inputs)
    y, final, _ = select_entry_point(forward, _forward, inputs)(*inputs, cu, keep)
    return y, final


def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and with `keep` the state before every CHUNK tokens."""
    outputs: tuple[Tensor, Tensor, Tensor] = _fake_forward(r, log_w, k, v, a, b, state, cu, keep)
    tensors = (r, log_w, k, v, a, b, state.contiguous(), *outputs)
    call(native_library("wkv7").wkv7_forward, tensors, cu, len(state), *r.shape[1:], CHUNK)
    return outputs


forward = torch.library.custom_op("heronry::wkv7", mutates_args=(), device_types="cpu")(_forward)


@forward.register_fake
def _fake_forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu: Sequence[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    batch, tokens, heads, size = r.shape
    chunks = batch * tokens // CHUNK + len(state) if keep else 0  # every sequence may end with a partial chunk
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(chunks, heads, size, size)


@torch.library.custom_op("heronry::wkv7_backward", mutates_args=(), device_types="cpu")
def backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    saved_states: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    cu: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, log_w, k, v, a, b and of the initial state."""
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = empty_gradients(
        r, log_w, k, v, a, b, saved_states, dy, dfinal, cu
    )
    tensors = (r, log_w, k, v, a, b, saved_states, dy, dfinal.contiguous(), *gradients)
    call(native_library("wkv7").wkv7_backward, tensors, cu, len(dfinal), *r.shape[1:], CHUNK)
    return gradients


register_backward(forward, backward)
