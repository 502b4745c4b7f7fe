"""MiSS (arXiv 2409.15371; once Bone, then DiSHA): one small matrix a matrix W [out, in], which starts at zero.

    W'[o, i] = W[o, i] + s D[i mod r, o]                     y = W x + s Dᵀ S,  S[j] = sum of x[i] over i mod r = j

- D is [r, out]; of the variant mini [r, m], whose columns repeat: D[i mod r, o mod m]
- bat cuts W into r x r blocks and has a matrix B [r, r] for each row of blocks (axis "out", as in peft) or for each
  column of blocks (axis "in", as in RWKV-PEFT): W'_ab = W_ab + W_ab B + B

Sources: tuners/miss of peft, merge.py of RWKV-PEFT; both variants of bat have the same shape for a square matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.layers import matmul, widen
from .matrices import Matrix, beside_of, weight_of

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class MiSS:
    """The change of one matrix: block [r, out], [r, m] or, of bat, [out / r or in / r, r, r]."""

    block: Tensor
    scale: float = 1.0
    axis: Axis = "out"  # of bat

    @property
    def method(self) -> str:
        return "MiSS"

    @property
    def is_bat(self) -> bool:
        return self.block.ndim == 3

    @property
    def rank(self) -> int:
        return self.block.shape[1 if self.is_bat else 0]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that was trained."""
        yield self.block

    def misfit(self, rows: int, columns: int) -> str | None:
        """What is wrong with the change of a matrix [rows, columns]; None if it fits."""
        shape = list(self.block.shape)
        matrix = f"for a matrix {[rows, columns]}"
        if len(shape) == 2:
            if shape[0] > columns:
                return f"a MiSS block of rank {shape[0]} {matrix}; the rank is at most {columns}"
            fits = shape[0] > 0 and shape[1] > 0 and rows % shape[1] == 0
        else:
            r = shape[-1]
            size = rows if self.axis == "out" else columns
            fits = len(shape) == 3 and r > 0 and rows % r == columns % r == 0 and shape == [size // r, r, r]
        return None if fits else f"a MiSS block {shape} {matrix}"

    def merge(self, weight: Tensor) -> Tensor:
        """The changed matrix [out, in], in float32 (float64 for a float64 weight)."""
        wide = widen(weight)
        block = self.scale * self.block.to(wide)
        if self.is_bat:
            return merge_bat(wide, block, self.axis)
        rows, columns = wide.shape
        r, m = block.shape
        return wide + block.T.repeat(rows // m, -(-columns // r))[:, :columns]

    def beside(self, base: Matrix) -> nn.Module:
        """A layer that computes with the matrix and its change, which is not merged."""
        return MiSSLinear(base, self)


class MiSSLinear(nn.Module):
    """MiSS beside a frozen matrix, plain or packed, for training and inference. The block is kept in float32 at least.

    Bat changes the matrix by a product with the matrix itself, so it is made anew at every call.
    """

    def __init__(self, base: Matrix, change: MiSS, dropout: float = 0.0):
        """dropout: of the inputs of the block, in training; not for bat."""
        super().__init__()
        self.base_layer = base
        self.miss_block = beside_of(base, change.block)
        self.scale, self.axis, self.dropout = change.scale, change.axis, dropout

    def forward(self, x: Tensor) -> Tensor:
        block = self.miss_block
        if block.ndim == 3:
            with torch.autocast(x.device.type, enabled=False):  # a small part of the work: it need not be rounded
                weight = weight_of(self.base_layer).to(block.dtype)
                changed = merge_bat(weight, self.scale * block, self.axis).to(x.dtype)
            return matmul(x, changed)
        y: Tensor = self.base_layer(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        change = matmul(fold(x, block), block.T)
        if (times := y.shape[-1] // change.shape[-1]) > 1:
            change = change.repeat(*[1] * (x.ndim - 1), times)
        changed_y: Tensor = y + (change if self.scale == 1 else self.scale * change)
        return changed_y.to(y.dtype)


def fold(x: Tensor, block: Tensor) -> Tensor:
    """S [..., r] of x [..., in], in the block's dtype; the last, shorter piece of x counts as padded with zeros."""
    r = len(block)
    if more := -x.shape[-1] % r:
        x = F.pad(x, (0, more))
    return torch.unflatten(x, -1, (-1, r)).sum(-2, dtype=block.dtype)


def merge_bat(weight: Tensor, block: Tensor, axis: Axis) -> Tensor:
    """The weight [out, in] as bat changes it. A row of blocks is one matrix [r * in / r, r] as it is in memory, and a
    column of blocks one of [out, r], so there is one product for each of them."""
    r = block.shape[-1]
    if axis == "out":
        cut = weight.reshape(len(block), -1, r)
        changed = torch.unflatten(torch.baddbmm(cut, cut, block), 1, (r, -1)) + block[:, :, None]
        return changed.reshape(weight.shape)
    cut = torch.unflatten(weight, 1, (-1, r)).transpose(0, 1)
    changed = torch.unflatten(torch.baddbmm(cut, cut, block), 1, (-1, r)) + block[:, None]
    return changed.flatten(1, 2).transpose(0, 1).reshape(weight.shape)
