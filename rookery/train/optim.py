"""The recipe: optimiser, learning rate, loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import Model
from .config import OptimSection


def optimizer(model: Model, of: OptimSection) -> torch.optim.Optimizer:
    """AdamW (Adam where nothing decays) over the groups of the generation; each remembers its own rate as "base_lr"."""
    groups = model.param_groups(of.lr, of.weight_decay)
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    groups = [{**group, "base_lr": group["lr"]} for group in groups if group["params"]]
    if model.sharded:  # pieces cost as much for each call as they hold; what stays whole cannot go among them
        groups = [{**group, "foreach": len({type(p) for p in group["params"]}) == 1} for group in groups]
    return torch.optim.AdamW(groups, lr=of.lr, betas=of.betas, eps=of.eps)


def rate(step: int, steps: int, of: OptimSection) -> float:
    """The learning rate of a step (from 0 on), as a share of `lr`: linear from a hundredth over the warm-up, then half
    a cosine down to lr_final / lr at the end."""
    if step < of.warmup:
        return 0.01 + 0.99 * step / of.warmup
    progress = min(1.0, (step - of.warmup) / max(1, steps - of.warmup))
    final = of.lr_final / of.lr
    return (0.5 + final / 2) + (0.5 - final / 2) * math.cos(math.pi * progress)


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * share


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
