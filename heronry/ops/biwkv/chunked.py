"""Bi-WKV as two scans over all tokens at once, from the left and from the right.

With the decay factored out, the sum over the tokens before a token is a running sum of e^(k_i - i log_w): one
cumulative operation of PyTorch, in the log domain so that nothing overflows, and in float64, which is precise enough
for exponents that grow with the number of tokens. Negative values have no logarithm, but a constant added to all values
is added to their mean too: values are raised above 0 and the mean is lowered again.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTHING = -1e38  # the logarithm of an empty sum: unlike -inf it has a gradient of 0


def chunked(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    dtype = v.dtype
    log_w, k, v, u = (x.double() for x in (log_w, k, v, u))
    weighted, floor = lift(k, v)
    past, future = scan(log_w, weighted), scan(log_w, weighted.flip(2)).flip(2)
    total, ones = torch.stack([past, future, weighted + u]).logsumexp(0).unbind(0)
    return ((total - ones).exp() + floor).to(dtype)


def lift(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of e^k (v - floor) and of e^k, [2, B, T, A], and the floor [B, 1, A], which is below all v."""
    low, high = v.detach().amin(1, keepdim=True), v.detach().amax(1, keepdim=True)
    floor = low - (high - low).clamp_min(1e-30 + 1e-12 * high.abs())
    return torch.stack([k + (v - floor).log(), k]), floor


def scan(log_w: Tensor, x: Tensor) -> Tensor:
    """An exclusive scan in the log domain: for x [2, B, T, A], log sum_{i < t} e^(log_w (t - 1 - i) + x_i) for every
    token t, [2, B, T, A]."""
    faded = torch.arange(x.shape[2], device=x.device)[:, None] * log_w  # [T, A]
    sums = (x[:, :, :-1] - faded[:-1]).logcumsumexp(2) + faded[:-1]
    return torch.cat([torch.full_like(x[:, :, :1], NOTHING), sums], 2)
