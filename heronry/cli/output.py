"""What commands print."""

from __future__ import annotations

import sys

from ..text.terminal import printable


def print_result(text: str, end: str = "\n", flush: bool = False) -> None:
    """Prints a result on standard output: as it is, but on a terminal without control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=flush)
