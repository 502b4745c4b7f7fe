"""The loss of a batch: cross entropy where the mask counts, and L2Wrap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def losses(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over all positions: of the cross entropy where the mask counts, in nats, and of half the square of the
    largest logit everywhere, which L2Wrap pulls at.

    logits [B, T, V] in any dtype, targets int64 [B, T], mask bool [B, T]. The gradient of the second is the largest
    logit itself, at its own place.
    """
    wide = logits.flatten(0, 1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    nats = F.cross_entropy(wide, targets.flatten(), reduction="none")
    if mask is not None:
        nats = nats * mask.flatten()
    return nats.sum(), 0.5 * wide.amax(-1).square().sum()
