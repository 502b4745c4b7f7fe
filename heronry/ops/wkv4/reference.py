"""WKV4 as a plain loop over time: the oracle of every other body."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reference(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv4`; cu is the checked tuple of boundaries."""
    if cu is not None:
        spans = [slice(start, end) for start, end in pairwise(cu)]
        parts = [reference(log_w, k[:, at], v[:, at], u, state[s : s + 1], None) for s, at in enumerate(spans)]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])

    dtype = v.dtype
    log_w, k, v, u = (x.to(state.dtype) for x in (log_w, k, v, u))
    a, b, p = state.unbind(1)
    ys = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):  # [B, A]
        # The units m and p cancel out of every value, so they need no gradient. They are subtracted first: the
        # difference of nearby numbers is exact, whereas p + log_w loses the digits of a slow decay where p is large.
        m = torch.maximum(p, k_t + u).detach()
        old, new = (p - m).exp(), (k_t - m + u).exp()
        ys.append((old * a + new * v_t) / (old * b + new))
        m = torch.maximum(p + log_w, k_t).detach()
        old, new = (p - m + log_w).exp(), (k_t - m).exp()
        a, b, p = old * a + new * v_t, old * b + new, m
    return torch.stack(ys, dim=1).to(dtype), torch.stack([a, b, p], dim=1)
