"""The attention of VRWKV6: WKV6 with one matrix state for the tokens before a token and another for those after it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import check_devices, check_shape, check_sizes, state_dtype
from ..wkv6 import BODIES as WKV6_BODIES
from ..wkv6 import wkv6
from . import recurrent

__all__ = ["BODIES", "biwkv6"]

BODIES = (*WKV6_BODIES, "recurrent")


def biwkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, *, impl: str = "auto") -> Tensor:
    """Per head, with w = exp(log_w), all vectors columns, and two states that begin with zeros at the two ends:

        y_t = (P_t + F_t + v_t k_t^T diag(u)) r_t
        P_{t+1} = P_t diag(w_t) + v_t k_t^T
        F_{t-1} = F_t diag(w_t) + v_t k_t^T

    Args:
        r, log_w, k, v: [B, T, H, N], any floating dtype. log_w <= 0 without a lower bound, -inf included.
        u: [H, N], the bonus of the token itself, which counts once.
        impl: "auto", "reference", "chunked" or "cpu" (C++), which are WKV6's, or "recurrent" (token by token).

    Returns:
        y [B, T, H, N] in v's dtype. There is no state: a picture has no continuation.

    Raises:
        ValueError: a shape, dtype or impl does not fit; the message names it.

    Source: the released code of VRWKV6 (OpenGVLab/Vision-RWKV).
    """
    shape = check_sizes("biwkv6", "r", r, "BTHN")
    for name, x in (("log_w", log_w), ("k", k), ("v", v)):
        check_shape("biwkv6", name, x, shape)
    check_shape("biwkv6", "u", u, shape[2:])
    check_devices("biwkv6", r, log_w, k, v, u)
    if impl != "auto" and impl not in BODIES:
        raise ValueError(f"biwkv6 has no body {impl!r}; choose one of auto, {', '.join(BODIES)}")
    if impl == "recurrent":
        return recurrent.recurrent(r, log_w, k, v, u)
    wide = v.to(state_dtype(r))  # both outputs take this dtype, so that only their sum is rounded
    past, _ = wkv6(r, log_w, k, wide, u, impl=impl)
    back = [x.flip(1) for x in (r, log_w, k, wide)]
    future, _ = wkv6(back[0], back[1], back[2], back[3], torch.zeros_like(u), impl=impl)
    return (past + future.flip(1)).to(v.dtype)
