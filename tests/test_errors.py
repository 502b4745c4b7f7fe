"""Messages of errors."""

from __future__ import annotations

from heronry.errors import show


def test_long_values_are_told_by_what_they_are():
    assert show("a" * 58) == repr("a" * 58)
    assert show("a" * 1234) == "a text of 1,234 characters"
    assert show([1] * 100) == "a list"
