"""Columns of text: nothing is cut, and no line ends in spaces."""

from __future__ import annotations

from collections.abc import Sequence

from .output import print_result


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of as many cells each, aligned at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_result("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
