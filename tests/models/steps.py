"""What tests of the native step compare it with."""

from __future__ import annotations

import torch
from torch import Tensor

from heronry import State
from heronry.models import Model

PACK = [0, 1, 8, 9, 20]  # boundaries


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def plain(model: Model, *args, **options) -> tuple[Tensor, State]:
    """What the modules give: they run wherever somebody could ask for gradients."""
    with torch.enable_grad():
        logits, state = model(*args, **options)
    return logits.detach(), state.detach()


def distance(x: Tensor, y: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    assert x.shape == y.shape
    return float((x.double() - y).abs().max() / y.abs().max())


def farthest(x: tuple[Tensor, State], y: tuple[Tensor, State]) -> float:
    """The largest distance of logits and state."""
    pairs = [(x[0], y[0])]
    for a, b in zip(x[1].layers, y[1].layers, strict=True):
        pairs += zip(a, b, strict=True)
    return max(distance(a, b) for a, b in pairs)


def same(x: tuple[Tensor, State], y: tuple[Tensor, State]) -> bool:
    """To the last bit."""
    tensors = [[logits, *(x for layer in state.layers for x in layer)] for logits, state in (x, y)]
    return all(map(torch.equal, *tensors))
