"""Bi-WKV in C++: cpu.cpp as a PyTorch operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import call
from ..dispatch import native_library, select_entry_point, state_dtype

CHUNK = 32  # tokens from one saved state to the next


def cpu(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    inputs = (log_w, k, v, u)
    y: Tensor
    y, _ = select_entry_point(forward, _forward, inputs)(*inputs)
    return y


def _forward(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """y, and for every CHUNK tokens the sums over the tokens after them, which the backward pass needs too."""
    y, saved_states = _fake_forward(log_w, k, v, u)
    call(
        native_library("biwkv").biwkv_forward,
        (log_w[None, None], k, v, u[None, None], y, saved_states),
        None,
        *k.shape,
        CHUNK,
    )
    return y, saved_states


forward = torch.library.custom_op("heronry::biwkv", mutates_args=(), device_types="cpu")(_forward)


@forward.register_fake
def _fake_forward(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs of the right shapes."""
    batch, tokens, channels = k.shape
    saved_states = k.new_empty(batch * -(-tokens // CHUNK), 3, channels, dtype=state_dtype(k))
    return v.new_empty(v.shape), saved_states


@torch.library.custom_op("heronry::biwkv_backward", mutates_args=(), device_types="cpu")
def backward(
    log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, saved_states: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of log_w, k, v and u."""
    dlog_w, dk, dv, du = _fake_backward(log_w, k, v, u, saved_states, dy)
    noted = saved_states.new_empty(len(saved_states), 6, saved_states.shape[2])
    # one gradient per sequence, summed in a fixed order: the same for any number of threads
    dlog_w_parts, du_parts = saved_states.new_empty(2, len(k), 1, k.shape[2])
    tensors = (log_w[None, None], k, v, u[None, None], saved_states, dy, noted, dlog_w_parts, dk, dv, du_parts)
    call(native_library("biwkv").biwkv_backward, tensors, None, *k.shape, CHUNK)
    dlog_w.copy_(dlog_w_parts.sum((0, 1)))
    du.copy_(du_parts.sum((0, 1)))
    return dlog_w, dk, dv, du


@backward.register_fake
def _fake_backward(
    log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, saved_states: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of the right shapes."""
    return log_w.new_empty(log_w.shape), k.new_empty(k.shape), v.new_empty(v.shape), u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = backward(*ctx.saved_tensors, dy)
    return gradients


forward.register_autograd(_gradients, setup_context=_save)
