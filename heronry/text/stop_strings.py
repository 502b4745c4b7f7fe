"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringBuffer:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    The total output depends on the text alone, not on how it is cut into pieces: it ends at the stop string that is
    complete first (of several that end together, the one that begins first).
    """

    def __init__(self, stops: Sequence[str], before: str = ""):
        """before: the text so far; a stop string may begin at its end."""
        self._stops = tuple(stops)
        keep = max((_overlap(before, stop) for stop in self._stops), default=0)
        self.held = before[len(before) - keep :]
        self.found: str | None = None  # the stop string

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def push(self, piece: str) -> str:
        """Takes the next piece; returns the text that is now certain to come before any stop string."""
        if not self._stops:
            return piece
        if self.stopped:
            return ""
        self.held += piece
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := self.held.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            out, self.held = self.held[:at], ""
            return out
        keep = max((_overlap(self.held, stop) for stop in self._stops), default=0)
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def finish(self) -> str:
        """Returns what was held back, at the end of a text without a stop string."""
        out, self.held = self.held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, but not all of it, that `text` ends with."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not text.endswith(stop[: len(text) - at]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
