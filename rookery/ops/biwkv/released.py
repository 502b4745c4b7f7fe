"""Bi-WKV with the arithmetic of the CUDA kernel that Vision-RWKV's released weights were trained with.

It cuts the tokens into segments of L = ceil(T / segments), and with t0 the first token of t's segment and w = -log_w
weighs token i, besides e^(k_i), by

    e^(-w (t - i))            i < t0           one factor more than the formula
    e^(-w (t - 1 - i))        t0 <= i < t      as the formula
    e^u                       i = t
    e^(-w (i - t))            i > t            one factor more
    (1 - e^w) e^(w (t - i))   t0 < i <= t      and this besides: what lies behind leaves the sum over what lies ahead,
                                               and the kernel takes away a factor less than it had put in
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import accumulator
from .chunked import NOTHING, mean, scan


def released(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, segments: int) -> Tensor:
    """See `biwkv`."""
    dtype, (batch, tokens) = v.dtype, k.shape[:2]
    log_w, k, v, u = (x.to(accumulator(k)) for x in (log_w, k, v, u))
    length = -(-tokens // segments)
    padding = (0, 0, 0, -tokens % length)
    k, v = F.pad(k, padding, value=NOTHING), F.pad(v, padding)  # at the end, where it weighs nothing
    own = torch.stack([v, torch.ones_like(v)], dim=2)  # [B, T, 2, A]

    def pieces(x: Tensor) -> Tensor:  # [B, T, ...] -> [B * segments, L, ...]
        return x.reshape(-1, length, *x.shape[2:])

    def whole(x: Tensor) -> Tensor:
        return x.reshape(batch, -1, *x.shape[2:])

    past, p = scan(log_w, k, v)
    future, q = scan(log_w, k.flip(1), v.flip(1))
    future, q = future.flip(1), q.flip(1)
    near, near_p = scan(log_w, pieces(k), pieces(v))
    inner = torch.arange(length, device=k.device)[:, None]  # t - t0
    far, far_p = pieces(past)[:, :1].expand(-1, length, -1, -1), pieces(p)[:, :1] + log_w * (inner + 1)
    # the last line of the table: a scan with the decay turned round of all but the segment's first, the token included
    later = torch.where(inner == 0, NOTHING, pieces(k))
    back, back_p = scan(-log_w, F.pad(later, (0, 0, 0, 1), value=NOTHING), F.pad(pieces(v), (0, 0, 0, 1)))
    back, back_p = back[:, 1:] * -torch.expm1(-log_w), back_p[:, 1:]
    parts = [(near, near_p), (far, far_p), (back, back_p)]
    terms = [(whole(part), whole(exponent)) for part, exponent in parts]
    return mean([*terms, (future, q + log_w), (own, k + u)])[:, :tokens].to(dtype)
