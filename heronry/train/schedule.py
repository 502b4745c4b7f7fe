"""The learning rate of every step."""

from __future__ import annotations

import math

import torch

from .config import OptimSection


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
