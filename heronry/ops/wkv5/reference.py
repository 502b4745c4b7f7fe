"""WKV5 as a plain loop over time: the oracle of every other body."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reference(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv5`; cu is the checked tuple of boundaries."""
    if cu is not None:
        spans = [slice(start, end) for start, end in pairwise(cu)]
        parts = [
            reference(r[:, at], log_w, k[:, at], v[:, at], u, state[s : s + 1], None) for s, at in enumerate(spans)
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])

    dtype = v.dtype
    r, log_w, k, v, u = (x.to(state.dtype) for x in (r, log_w, k, v, u))
    w, u = log_w.exp()[:, None], u[:, None]  # [H, 1, N_k]
    ys = []
    for r_t, k_t, v_t in zip(r.unbind(1), k.unbind(1), v.unbind(1), strict=True):  # [B, H, N]
        kv = v_t[..., :, None] * k_t[..., None, :]  # [B, H, N_v, N_k]
        ys.append(((state + kv * u) @ r_t[..., None])[..., 0])
        state = state * w + kv
    return torch.stack(ys, dim=1).to(dtype), state
