"""How the engine cuts its work into model calls.

What a sequence gets must not depend on who else is read or decoded beside it, nor on whether a part of its prompt was
read before. Most matrix products round differently for other numbers of rows, so:

- a prompt is cut at fixed places, counted from its beginning, whatever was read before
- prompts share a call, and are cut where it suits, only where that is known to change no bit; the same goes for
  sequences that take a step together

On other devices than a CPU nothing of this is known yet: sequences are read and decoded together, and rounding may
depend on who is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..models import Model
from ..models.native_step import MAX_CALL_TOKENS, MAX_TOKENS, has_fast_matmul

GRID = 64  # tokens: finer, and what is kept of a prompt would cost more than reading it again


@dataclass(frozen=True)
class CallSizes:
    """Of one model on its device.

    grid: a prompt may be cut at multiples of so many tokens.
    tokens: in a call that reads, a multiple of the grid. If it is the grid, every prompt is cut at all its multiples.
    shared: several prompts may be read in one call.
    rows: sequences that take a step in one call at most.
    """

    grid: int
    tokens: int
    shared: bool
    rows: int

    def next_cut(self, position: int, length: int, at: Iterable[int] = ()) -> int:
        """Up to where a prompt of so many tokens is read in one call, from a position on the grid. at: positions on the
        grid at which it is cut as well."""
        return min(position + self.tokens, length, *(x for x in at if x > position))


def choose_call_sizes(model: Model) -> CallSizes:
    """The largest calls with which a sequence's numbers are its own; tests/engine/test_call_sizes.py looks at every
    generation and dtype."""
    if model.device.type != "cpu":
        return CallSizes(512, 512, shared=True, rows=512)
    native, fast = model.usable_native_step() is not None, has_fast_matmul(model.dtype)
    rows = MAX_TOKENS if native else 1  # PyTorch's small products round by the number of rows
    if native and (model.quantization is not None or not fast):  # the C++ step reads prompts too
        return CallSizes(GRID, MAX_CALL_TOKENS, shared=True, rows=rows)
    if model.dtype == torch.bfloat16 and model.quantization is None and fast:  # oneDNN takes every row alike
        return CallSizes(GRID, 512, shared=True, rows=rows)
    return CallSizes(128, 128, shared=False, rows=rows)
