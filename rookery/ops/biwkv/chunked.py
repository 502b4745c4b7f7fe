"""Bi-WKV as two scans in chunks, from the left and from the right, side by side in one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulator
from ..packing import Chunks
from ..wkv4.chunked import LENGTH, NOTHING, running_sums


def chunked(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    dtype, batch = v.dtype, len(k)
    log_w, k, v, u = (x.to(accumulator(k)) for x in (log_w, k, v, u))
    sums, units = scan(log_w, torch.cat([k, k.flip(1)]), torch.cat([v, v.flip(1)]))
    (past, future), (p, q) = (sums[:batch], sums[batch:].flip(1)), (units[:batch], units[batch:].flip(1))
    own = torch.stack([v, torch.ones_like(v)], dim=2)
    return mean([(past, p), (future, q), (own, k + u)]).to(dtype)


def scan(log_w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What each token meets of those before it: [B, T, 2, A], the sums of weighted values and of weights, in units
    e^p, p [B, T, A]."""
    cut = Chunks.of(k.shape[0], k.shape[1], None, min(LENGTH, k.shape[1]))
    state = torch.stack([torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], NOTHING)], 1)
    sums, units, _ = running_sums(cut, log_w, k, v, state)
    return cut.join(sums), cut.join(units)


def mean(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The quotient of the two sums, each given in parts [B, T, 2, A] with their exponents [B, T, A]."""
    top = torch.stack([exponent for _, exponent in terms]).amax(0).detach()
    total = torch.stack([(exponent - top).exp()[:, :, None] * part for part, exponent in terms]).sum(0)
    return total[:, :, 0] / total[:, :, 1]
