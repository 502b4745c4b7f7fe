"""WKV7 as a plain loop over time: the oracle of every other body."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reference(
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
    if cu is not None:
        spans = [slice(start, end) for start, end in pairwise(cu)]
        parts = [
            reference(r[:, at], log_w[:, at], k[:, at], v[:, at], a[:, at], b[:, at], state[s : s + 1], None)
            for s, at in enumerate(spans)
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])

    dtype = v.dtype
    r, w, k, v, a, b = (x.to(state.dtype) for x in (r, log_w.to(state.dtype).exp(), k, v, a, b))
    ys = []
    for r_t, w_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in (r, w, k, v, a, b)), strict=True):  # [B, H, N]
        z = state @ a_t[..., None]  # [B, H, N_v, 1], what the state holds under the key a
        state = state * w_t[..., None, :] + z * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        ys.append((state @ r_t[..., None])[..., 0])
    return torch.stack(ys, dim=1).to(dtype), state
