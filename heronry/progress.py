"""How far a long piece of work is: loading, quantizing, converting, reading a prompt or texts."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]  # called with the bytes (of texts, the tokens) done, and in all


class ByteCounter:
    """Adds up bytes and reports the sum to a `Progress`, if there is one."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self.progress = 0, total, progress

    def add(self, count: int) -> None:
        """Reports that `count` more bytes are done."""
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)
