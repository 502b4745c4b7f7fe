"""Which parts of the work can be done at once: layers times pieces of a text.

Layer l can read piece c once layer l - 1 has read it and layer l itself has read piece c - 1. So all cells with the
same l + c can run together: a wave through the grid, of L + C - 1 steps in place of L times C.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..models import Model
from .inside import as_row, plain_modules


class Cascade(NamedTuple):
    """How this package read a text, layer by layer and piece by piece.

    chunk: tokens a piece.
    begins, seconds: [L, C], when each cell began, from the beginning, and how long it took.
    """

    chunk: int
    begins: NDArray[Any]
    seconds: NDArray[Any]

    @property
    def steps(self) -> NDArray[Any]:
        """The step of each cell if all that can run together do, [L, C], from 0."""
        layers, pieces = self.seconds.shape
        return np.arange(layers)[:, None] + np.arange(pieces)

    @property
    def ideal_begins(self) -> NDArray[Any]:
        """When each cell could begin if it only waited for what it needs, [L, C], in seconds."""
        layers, pieces = self.seconds.shape
        ends = np.zeros((layers + 1, pieces + 1))
        for layer in range(layers):
            for piece in range(pieces):
                before = max(ends[layer, piece + 1], ends[layer + 1, piece])
                ends[layer + 1, piece + 1] = before + self.seconds[layer, piece]
        begins: NDArray[Any] = ends[1:, 1:] - self.seconds
        return begins


@torch.inference_mode()
def measure_cascade(model: Model, tokens: Sequence[int], chunk: int) -> Cascade:
    """Reads a text in pieces of `chunk` tokens, after a first time that does not count."""
    row = as_row(model, tokens)
    pieces = row.split(chunk, 1)
    marks: list[float] = []  # begin and end of each cell, in the order in which they ran

    def mark(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    with plain_modules(model), ExitStack() as hooks:
        for block in model.blocks:
            hooks.enter_context(block.register_forward_pre_hook(mark))
            hooks.enter_context(block.register_forward_hook(mark))
        for count in (1, len(pieces)):
            marks.clear()
            state = None
            for piece in pieces[:count]:
                _, state = model(piece, state, last_only=True)
    times = np.array(marks).reshape(len(pieces), -1, 2).transpose(1, 0, 2) - marks[0]  # [L, C, 2]
    return Cascade(chunk, times[..., 0], times[..., 1] - times[..., 0])
