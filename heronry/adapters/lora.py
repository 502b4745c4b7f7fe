"""LoRA (arXiv 2106.09685) adds the product of two thin matrices to a matrix W; DoRA (arXiv 2402.09353) also learns the
length m of each row of the sum:

    W' = W + s B A        W' = m (W + s B A) / |W + s B A|        s = alpha / rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.layers import matmul, widen
from .matrices import Matrix, beside_of, weight_of


@dataclass(frozen=True)
class LoRA:
    """The change of one matrix: a [rank, in], b [out, rank]; for DoRA also magnitude [out]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def method(self) -> str:
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        return len(self.a)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that was trained."""
        yield from (x for x in (self.a, self.b, self.magnitude) if x is not None)

    def misfit(self, rows: int, columns: int) -> str | None:
        """What is wrong with the change of a matrix [rows, columns]; None if it fits."""
        a, b = list(self.a.shape), list(self.b.shape)
        if a[1:] != [columns] or b[:1] != [rows] or b[1:] != a[:1]:
            return f"lora_A {a} and lora_B {b} for a matrix {[rows, columns]}"
        if self.magnitude is not None and list(self.magnitude.shape) != [rows]:
            return f"lora_magnitude_vector {list(self.magnitude.shape)} for a matrix {[rows, columns]}"
        return None

    def merge(self, weight: Tensor) -> Tensor:
        """The changed matrix [out, in], in float32 (float64 for a float64 weight)."""
        wide = widen(weight)
        matrix = wide + self.scale * (self.b.to(wide) @ self.a.to(wide))
        if self.magnitude is not None:
            matrix *= (self.magnitude.to(wide) / torch.linalg.norm(matrix, dim=1))[:, None]
        return matrix

    def beside(self, base: Matrix) -> nn.Module:
        """A layer that computes with the matrix and its change, which is not merged."""
        return LoRALinear(base, self)


class LoRALinear(nn.Module):
    """LoRA or DoRA beside a frozen matrix, for inference (peft's layer trains them). They are kept and computed in
    float32 at least, and their sum with the matrix's product is rounded once."""

    def __init__(self, base: Matrix, change: LoRA):
        super().__init__()
        self.base_layer = base
        self.a, self.b = beside_of(base, change.a), beside_of(base, change.b)
        self.scale = change.scale
        self.stretch: nn.Parameter | None = None  # of each row, DoRA's m / |W + s B A|
        if change.magnitude is not None:
            lengths = torch.linalg.norm(widen(weight_of(base)) + self.scale * (self.b @ self.a), dim=1)
            self.stretch = beside_of(base, change.magnitude.to(lengths) / lengths)
            if not self.stretch.isfinite().all():
                raise InputError("has rows of zeros, which no magnitude of DoRA can scale")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        changed = y + self.scale * matmul(matmul(x.to(self.a.dtype), self.a), self.b)
        return (changed if self.stretch is None else changed * self.stretch).to(y.dtype)
