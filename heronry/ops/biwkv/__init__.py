"""Bi-WKV, the attention of Vision-RWKV: WKV4's weighted mean over the tokens before and after each token."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import check_shape, check_sizes, longest_sequence, select_body
from . import chunked, cpu, recurrent, reference, released

__all__ = ["BODIES", "biwkv"]

BODIES = {
    "reference": reference.reference,
    "chunked": chunked.chunked,
    "recurrent": recurrent.recurrent,
    "cpu": cpu.cpu,
}


def biwkv(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, *, segments: int | None = None, impl: str = "auto") -> Tensor:
    """Per channel, for all tokens t of a picture:

        y_t = (sum_{i != t} e^(log_w (|t - i| - 1) + k_i) v_i + e^(u + k_t) v_t) / (the same with v = 1)

    Args:
        log_w, u: [A], the log of a weight's decay per token of distance, and the bonus of the token itself. Vision-RWKV
            passes -spatial_decay / T and spatial_first / T; a log_w above 0, with which weights grow with the distance,
            is allowed.
        k, v: [B, T, A], any floating dtype.
        segments: None for the formula; 32 for the arithmetic of the CUDA kernel that the released weights were trained
            with, which cuts the tokens into that many segments and differs a little from the formula (see README.md).
        impl: "auto", "reference", "chunked", "recurrent" (token by token in constant memory) or "cpu" (C++); with
            `segments` only "auto" or "chunked".

    Returns:
        y [B, T, A] in v's dtype. There is no state: a picture has no continuation.

    Raises:
        ValueError: a shape, dtype, impl or number of segments does not fit; the message names it.

    Source: Vision-RWKV (arXiv 2403.02308), equation 5.
    """
    batch, tokens, channels = check_sizes("biwkv", "k", k, "BTA")
    check_shape("biwkv", "v", v, (batch, tokens, channels))
    check_shape("biwkv", "log_w", log_w, (channels,))
    check_shape("biwkv", "u", u, (channels,))
    if segments is not None:
        if segments < 1:
            raise ValueError(f"biwkv: segments must be at least 1, got {segments}")
        if impl not in ("auto", "chunked"):
            raise ValueError(f"biwkv has no body {impl!r} with segments; choose one of auto, chunked")
        return select_body(
            "biwkv", "chunked", {"chunked": released.released}, longest_sequence(tokens, None), k.device
        )(log_w, k, v, u, segments)
    # without C++ the plain loop is the faster body on a CPU, however long
    many = 1 if k.device.type == "cpu" else longest_sequence(tokens, None)
    return select_body("biwkv", impl, BODIES, many, k.device)(log_w, k, v, u)
