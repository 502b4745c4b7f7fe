"""Bi-WKV as two plain loops over time: the oracle of every other body."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import state_dtype

NOTHING = -1e38  # the exponent of an empty sum: unlike -inf it can be subtracted from itself


def reference(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    dtype = v.dtype
    log_w, k, v, u = (x.to(state_dtype(k)) for x in (log_w, k, v, u))
    empty = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], NOTHING)
    after = [empty]  # the sums over the tokens to the right, those of the last token first
    for k_t, v_t in zip(k[:, 1:].flip(1).unbind(1), v[:, 1:].flip(1).unbind(1), strict=True):
        after.append(add(after[-1], log_w, k_t, v_t))
    before, ys = empty, []
    for k_t, v_t, (c, d, q) in zip(k.unbind(1), v.unbind(1), reversed(after), strict=True):  # [B, A]
        a, b, p = before
        m = torch.maximum(torch.maximum(p, q), k_t + u).detach()  # a unit, which cancels out of the quotient
        past, future, own = (p - m).exp(), (q - m).exp(), (k_t - m + u).exp()
        ys.append((past * a + future * c + own * v_t) / (past * b + future * d + own))
        before = add(before, log_w, k_t, v_t)
    return torch.stack(ys, dim=1).to(dtype)


def add(sums: tuple[Tensor, Tensor, Tensor], log_w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a token to the sums (a, b, p) over those farther away, [B, A]; units are subtracted first, see wkv4."""
    a, b, p = sums
    m = torch.maximum(p + log_w, k).detach()
    old, new = (p - m + log_w).exp(), (k - m).exp()
    return old * a + new * v, old * b + new, m
