"""What a conversion returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass
class Converted:
    """The result of a conversion.

    Attributes:
        format: of the target.
        bytes: its size.
        difference: the largest absolute difference between a logit of the source and of the target.
        largest: the largest absolute logit of the source.
    """

    format: str
    bytes: int
    difference: float
    largest: float

    @classmethod
    def compare(cls, format: str, target: Path, expected: Tensor, logits: Tensor) -> Converted:
        """The result for a target whose logits are `logits` where those of the source are `expected`."""
        difference = (logits - expected).abs().max().item()
        return cls(format, size_of(target), difference, expected.abs().max().item())


def size_of(path: Path) -> int:
    """The size of a file, or of the files in a folder, in bytes."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
