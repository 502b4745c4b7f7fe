"""The learning rate of every step."""

from __future__ import annotations

import math

import torch

from .config import OptimSection


def lr_factor(step: int, steps: int, config: OptimSection) -> float:
    """The learning rate of a step (counted from 0), as a fraction of `lr`.

    Linear from 1/100 during the warm-up, then half a cosine down to lr_final / lr at the end of the run.
    """
    if step < config.warmup:
        return 0.01 + 0.99 * step / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    final = config.lr_final / config.lr
    return (0.5 + final / 2) + (0.5 - final / 2) * math.cos(math.pi * progress)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to `factor` times its "base_lr"."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
