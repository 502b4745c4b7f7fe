"""WKV7 as a plain loop over time: the oracle of every other body."""

from __future__ import annotations

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
        parts = [
            reference(*(x[:, start:end] for x in (r, log_w, k, v, a, b)), state[s : s + 1], None)
            for s, (start, end) in enumerate(zip(cu, cu[1:], strict=False))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])

    dtype = v.dtype
    r, w, k, v, a, b = (x.to(state.dtype) for x in (r, log_w, k, v, a, b))
    w = w.exp()
    ys = []
    for t in range(r.shape[1]):
        z = state @ a[:, t, :, :, None]  # [B, H, N_v, 1], what the state holds under the key a
        state = state * w[:, t, :, None, :] + z * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append((state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(ys, dim=1).to(dtype), state
