"""WKV4, the recurrence of RWKV-4 "Dove": per channel, an exponentially decaying weighted mean of the values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import check_shape, check_sizes, longest_sequence, select_body, state_dtype
from ..packing import boundaries
from . import chunked, cpu, reference
from .chunked import NOTHING

__all__ = ["BODIES", "wkv4"]

BODIES = {"reference": reference.reference, "chunked": chunked.chunked, "cpu": cpu.cpu}


def wkv4(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per channel, with w = exp(log_w) and the two sums A (of weighted values) and B (of weights):

        y_t = (A_t + exp(u + k_t) v_t) / (B_t + exp(u + k_t))
        A_{t+1} = w A_t + exp(k_t) v_t
        B_{t+1} = w B_t + exp(k_t)

    The sums overflow for keys that a trained model has, so a state is (a, b, p) with A = a exp(p), B = b exp(p),
    and p the largest exponent among the terms. Only the sums mean anything; p is a choice of unit. It is
    returned as a constant: let a loss on the final state depend on a exp(p) and b exp(p), as every
    continuation of the sequence does. The initial p has its gradient, a * grad(a) + b * grad(b).

    Args:
        log_w, u: [A], the log of the decay per token, <= 0 (RWKV-4 passes -exp(time_decay)), and the bonus of the
            current token (time_first).
        k, v: [B, T, A], any floating dtype.
        state: [B, 3, A], rows a, b, p; or None for an empty one (0, 0, -1e38). Packed: one per sequence.
        cu_seqlens: [sequences + 1] marks the sequences packed into B = 1 (see ops/packing.py).
        impl: "auto", "reference", "chunked" or "cpu" (C++).

    Returns:
        y [B, T, A] in v's dtype, and the final state, float32 (float64 for float64 activations).

    Raises:
        ValueError: a shape, dtype, cu_seqlens or impl does not fit; the message names it.

    Source: RWKV (arXiv 2305.13048), section 3.1 and appendix D; derivation of the chunked form in README.md.
    """
    batch, tokens, channels = check_sizes("wkv4", "k", k, "BTA")
    check_shape("wkv4", "v", v, (batch, tokens, channels))
    check_shape("wkv4", "log_w", log_w, (channels,))
    check_shape("wkv4", "u", u, (channels,))
    cu = boundaries(cu_seqlens, batch, tokens)
    rows = batch if cu is None else len(cu) - 1
    if state is None:
        start = torch.tensor([0.0, 0.0, NOTHING], dtype=state_dtype(k), device=k.device)
        state = start[:, None].expand(rows, 3, channels)
    else:
        check_shape("wkv4", "state", state, (rows, 3, channels))
    body = select_body("wkv4", impl, BODIES, longest_sequence(tokens, cu), k.device)
    return body(log_w, k, v, u, state.to(state_dtype(k)), cu)
