"""WKV7, the recurrence of RWKV-7 "Goose": a matrix state per head, edited by a generalised delta rule."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import check_shape, check_sizes, longest_sequence, select_body, state_dtype
from ..packing import boundaries
from . import chunked, cpu, reference

__all__ = ["BODIES", "wkv7"]

BODIES = {"reference": reference.reference, "chunked": chunked.chunked, "cpu": cpu.cpu}


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per head, with S the state [N_v, N_k], w = exp(log_w) and all vectors columns:

        S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T
        y_t = S_t r_t

    Args:
        r, log_w, k, v, a, b: [B, T, H, N], any floating dtype. log_w <= 0; RWKV-7 keeps it in (-0.6066, 0) and
            passes a = -kappa, b = kappa * in-context learning rate, with |kappa| = 1. The chunked body needs
            the sum of log_w over 32 tokens to stay above -80, which RWKV-7's range does by far.
        state: [B, H, N, N] value-major, or None for zeros. Packed: one row per sequence.
        cu_seqlens: [sequences + 1] marks the sequences packed into B = 1 (see ops/packing.py).
        impl: "auto", "reference", "chunked" or "cpu" (C++).

    Returns:
        y [B, T, H, N] in v's dtype, and the final state, float32 (float64 for float64 activations).

    Raises:
        ValueError: a shape, dtype, cu_seqlens or impl does not fit; the message names it.

    Source: RWKV-7 "Goose" (arXiv 2503.14456), section 3; derivation of the chunked form in README.md.
    """
    batch, tokens, heads, size = check_sizes("wkv7", "r", r, "BTHN")
    for name, x in (("log_w", log_w), ("k", k), ("v", v), ("a", a), ("b", b)):
        check_shape("wkv7", name, x, (batch, tokens, heads, size))
    cu = boundaries(cu_seqlens, batch, tokens)
    rows = batch if cu is None else len(cu) - 1
    if state is None:
        state = r.new_zeros(rows, heads, size, size, dtype=state_dtype(r))
    else:
        check_shape("wkv7", "state", state, (rows, heads, size, size))
    body = select_body("wkv7", impl, BODIES, longest_sequence(tokens, cu), r.device)
    return body(r, log_w, k, v, a, b, state.to(state_dtype(r)), cu)
