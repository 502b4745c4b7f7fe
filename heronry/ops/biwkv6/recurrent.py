"""VRWKV6's operator token by token: two states per head, each updated from the previous one.

Every token is removed from the future as it is read: F_t = (F_{t-1} - v_t k_t^T) diag(1 / w_t). Dividing by decay after
decay amplifies every rounding error by the decays of all tokens since the future was gathered, so it is held in float64
and gathered again once some channel has grown by e^GROWTH. VRWKV6's decays are per token and not divided by the number
of tokens, as Bi-WKV's are, so that this happens every few dozen tokens (README.md). Therefore the future at the end of
every BLOCK tokens is kept, and only the rest of a block is gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..wkv6 import wkv6

GROWTH = 20.0  # a logarithm: e^20 times the rounding error of float64 is 1e-7
BLOCK = 64


def gather(log_w: Tensor, k: Tensor, v: Tensor, beyond: Tensor | None = None) -> Tensor:
    """The state [B, H, N_v, N_k] after these tokens, read from the last to the first; float64. beyond: the state that
    the last one finds, zeros if None."""
    log_w, k, v = (x.double().flip(1) for x in (log_w, k, v))
    return wkv6(torch.zeros_like(k), log_w, k, v, torch.zeros_like(k[0, 0]), beyond)[1]


def recurrent(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv6`."""
    dtype = v.dtype
    r, log_w, k, v, u = (x.double() for x in (r, log_w, k, v, u))
    past = torch.zeros_like(v[:, 0, :, :, None] * k[:, 0, :, None])  # [B, H, N_v, N_k]
    beyond = [past]  # the future at the end of every block, the last block first
    for start in reversed(range(0, k.shape[1], BLOCK)):
        block = slice(start, start + BLOCK)
        beyond.append(gather(log_w[:, block], k[:, block], v[:, block], beyond[-1]))
    future, rest, grown = beyond.pop(), past, torch.zeros_like(k[:, 0])
    ys = []
    for t, (r_t, log_w_t, k_t, v_t) in enumerate(zip(*(x.unbind(1) for x in (r, log_w, k, v)), strict=True)):
        own = v_t[..., :, None] * k_t[..., None, :]
        grown = grown - log_w_t.detach()
        if t % BLOCK == 0:
            rest = beyond.pop()
        if t % BLOCK == BLOCK - 1 or t + 1 == k.shape[1]:
            future, grown = rest, torch.zeros_like(grown)
        elif bool((grown > GROWTH).any()):
            block = slice(t + 1, t - t % BLOCK + BLOCK)
            future, grown = gather(log_w[:, block], k[:, block], v[:, block], rest), torch.zeros_like(grown)
        else:
            future = (future - own) * (-log_w_t).exp()[..., None, :]
        ys.append(((past + future + own * u[..., None, :]) @ r_t[..., None])[..., 0])
        past = past * log_w_t.exp()[..., None, :] + own
    return torch.stack(ys, dim=1).to(dtype)
