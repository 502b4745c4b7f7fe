"""The loss of a batch: cross entropy where the mask counts, and L2Wrap.

- a chunk of positions is widened to float32 at a time: beside the logits there is never more than that
- the backward pass computes the probabilities again from the logits and one number a position
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22  # logits that are widened at a time: 16 MiB in float32


def sum_losses(
    logits: Tensor, targets: Tensor, mask: Tensor | None, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Two sums over all positions, as scalars in float32 (float64 for float64 logits).

    Args:
        logits: [B, T, V] in any dtype.
        targets: int64 [B, T].
        mask: bool [B, T], where the cross entropy counts; None: everywhere.
        overwrite: the backward pass writes the gradient over the logits, for which the caller has no more use.

    Returns:
        The cross entropy where the mask counts, in nats; and half the square of the largest logit of every position,
        masked or not, for L2Wrap: the gradient of the latter is the largest logit itself, at its own place.
    """
    counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    apply: Any = _SumLosses.apply  # without types in torch
    nats, squares = apply(logits.contiguous(), targets.flatten(), counts.flatten(), overwrite)
    return nats, squares


class _SumLosses(torch.autograd.Function):
    """See `sum_losses`; targets and counts are [N]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counts: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
        rows = logits.view(-1, logits.shape[-1])
        wide_dtype = torch.promote_types(logits.dtype, torch.float32)
        largest, log_sums = rows.new_empty(2, len(rows), dtype=wide_dtype)
        places = torch.empty_like(targets)
        nats, squares = rows.new_zeros(2, dtype=wide_dtype)
        for part, wide in _widen(rows, wide_dtype):
            torch.max(wide, -1, out=(largest[part], places[part]))
            chosen = wide.gather(1, targets[part, None])[:, 0]
            log_sums[part] = wide.sub_(largest[part, None]).exp_().sum(-1).log_().add_(largest[part])
            nats += ((log_sums[part] - chosen) * counts[part]).sum()
            squares += 0.5 * largest[part].square().sum()
        ctx.save_for_backward(logits, targets, counts, largest, log_sums, places)
        ctx.overwrite = overwrite
        return nats, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nats_grad: Tensor, squares_grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, counts, largest, log_sums, places = ctx.saved_tensors
        gradient = logits if ctx.overwrite else torch.empty_like(logits)
        rows, results = (x.view(-1, x.shape[-1]) for x in (logits, gradient))
        weights, pulls = counts * nats_grad, largest * squares_grad  # [N]
        for part, wide in _widen(rows, largest.dtype):
            wide.sub_(log_sums[part, None]).exp_().mul_(weights[part, None])
            wide.scatter_add_(1, targets[part, None], -weights[part, None])
            wide.scatter_add_(1, places[part, None], pulls[part, None])
            results[part] = wide
        return gradient, None, None, None


def _widen(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of [N, V] a chunk holds, and a copy of them in one buffer for all chunks."""
    size = max(1, CHUNK // rows.shape[1])
    buffer = rows.new_empty(min(size, len(rows)), rows.shape[1], dtype=dtype)
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, buffer[: part.stop - start].copy_(rows[part])
