"""Text from outside, as it may go to a terminal: what a model writes, names of files, labels."""

from __future__ import annotations

# Control characters move the cursor, set the title or answer in the user's place. Each becomes its picture ("␛"); those
# that have none, the eight-bit ones, become "�".
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {127: "␡"} | dict.fromkeys(range(128, 160), "\ufffd")
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")  # halves of surrogate pairs, which cannot be encoded
_PICTURES |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def printable(text: str) -> str:
    """The text without control characters, except line breaks and tabs."""
    return text.translate(_PICTURES)
