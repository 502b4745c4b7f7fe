"""The loss of a batch: cross entropy where the mask counts, and L2Wrap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sum_losses(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two sums over all positions, as scalars in float32 (float64 for float64 logits).

    Args:
        logits: [B, T, V] in any dtype.
        targets: int64 [B, T].
        mask: bool [B, T], where the cross entropy counts; None: everywhere.

    Returns:
        The cross entropy where the mask counts, in nats; and half the square of the largest logit of every position,
        masked or not, for L2Wrap: the gradient of the latter is the largest logit itself, at its own place.
    """
    wide = logits.flatten(0, 1)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    nats = F.cross_entropy(wide, targets.flatten(), reduction="none")
    if mask is not None:
        nats = nats * mask.flatten()
    return nats.sum(), 0.5 * wide.amax(-1).square().sum()
