"""Bi-WKV with the arithmetic of the CUDA kernel that Vision-RWKV's released weights were trained with.

It cuts the tokens into segments of L = ceil(T / segments). With t0 the first token of t's segment and w = -log_w, it
multiplies the weight e^(k_i) of token i by

    e^(-w (t - i))            i < t0           one factor e^-w more than the formula
    e^(-w (t - 1 - i))        t0 <= i < t      as the formula
    e^u                       i = t
    e^(-w (i - t))            i > t            one factor more
    (1 - e^w) e^(w (t - i))   t0 < i <= t      and in addition by this: tokens that have been passed are subtracted from
                                               the sum over those ahead with one factor less than they were added with
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunked import NOTHING, lift, scan


def released(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, segments: int) -> Tensor:
    """See `biwkv`."""
    dtype, tokens = v.dtype, k.shape[1]
    log_w, k, v, u = (x.double() for x in (log_w, k, v, u))
    length = -(-tokens // segments)
    weighted, floor = lift(k, v)
    weighted = F.pad(weighted, (0, 0, 0, -tokens % length), value=NOTHING)  # padding at the end has no weight

    def pieces(x: Tensor) -> Tensor:  # [2, B, T, A] -> [2, B * segments, L, A]
        return torch.unflatten(x, 2, (-1, length)).flatten(1, 2)

    inner = torch.arange(length, device=k.device)[:, None]  # t - t0
    near = scan(log_w, pieces(weighted))
    far = pieces(scan(log_w, weighted))[:, :, :1] + log_w * (inner + 1)
    # the last line of the table: a scan with the decay inverted, over all tokens but the segment's first, t included
    later = F.pad(torch.where(inner == 0, NOTHING, pieces(weighted)), (0, 0, 0, 1), value=NOTHING)
    back = scan(-log_w, later)[:, :, 1:]
    parts = [x.unflatten(1, (len(k), -1)).flatten(2, 3) for x in (near, far, back)]
    terms = torch.stack([*parts, scan(log_w, weighted.flip(2)).flip(2) + log_w, weighted + u])[..., :tokens, :]
    top = terms[:, 1].detach().amax(0)  # a unit, which cancels out of the quotient
    signs = torch.ones(len(terms), 1, 1, 1, 1, dtype=k.dtype, device=k.device) * torch.ones_like(log_w)
    signs[2] = -torch.expm1(-log_w)
    total, ones = (signs * (terms - top).exp()).sum(0).unbind(0)
    return (total / ones + floor).to(dtype)
