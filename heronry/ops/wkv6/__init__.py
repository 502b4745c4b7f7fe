"""WKV6, the recurrence of RWKV-6 "Finch": WKV5 with a decay that depends on the token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import check_shape, check_sizes, longest_sequence, select_body, state_dtype
from ..packing import boundaries
from . import chunked, cpu, reference

__all__ = ["BODIES", "wkv6"]

BODIES = {"reference": reference.reference, "chunked": chunked.chunked, "cpu": cpu.cpu}


def wkv6(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Per head, with S the state [N_v, N_k], w = exp(log_w) and all vectors columns:

        y_t = (S_{t-1} + v_t k_t^T diag(u)) r_t
        S_t = S_{t-1} diag(w_t) + v_t k_t^T

    Args:
        r, log_w, k, v: [B, T, H, N], any floating dtype. log_w <= 0 without a lower bound, -inf included.
        u: [H, N], the bonus of the current token.
        state: [B, H, N, N] value-major, or None for zeros. Packed: one row per sequence.
        cu_seqlens: [sequences + 1] marks the sequences packed into B = 1 (see ops/packing.py).
        impl: "auto", "reference", "chunked" or "cpu" (C++).

    Returns:
        y [B, T, H, N] in v's dtype, and the final state, float32 (float64 for float64 activations).

    Raises:
        ValueError: a shape, dtype, cu_seqlens or impl does not fit; the message names it.

    Source: Eagle and Finch (arXiv 2404.05892), section 4; derivation of the chunked form in README.md.
    """
    batch, tokens, heads, size = check_sizes("wkv6", "r", r, "BTHN")
    for name, x in (("log_w", log_w), ("k", k), ("v", v)):
        check_shape("wkv6", name, x, (batch, tokens, heads, size))
    check_shape("wkv6", "u", u, (heads, size))
    cu = boundaries(cu_seqlens, batch, tokens)
    rows = batch if cu is None else len(cu) - 1
    if state is None:
        state = r.new_zeros(rows, heads, size, size, dtype=state_dtype(r))
    else:
        check_shape("wkv6", "state", state, (rows, heads, size, size))
    body = select_body("wkv6", impl, BODIES, longest_sequence(tokens, cu), r.device)
    return body(r, log_w, k, v, u, state.to(state_dtype(r)), cu)
