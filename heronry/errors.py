"""The one error a user can cause."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What came from outside is wrong: a file, a prompt, a state, an option.

    The message is one line that says what is wrong and, where it helps, what to do.
    The command line prints it and exits with code 2.

    param: which argument, or which part of one, is wrong, such as "messages.[0].content"; None where it is not said.
    """

    def __init__(self, message: str = "", *, param: str | None = None):
        super().__init__(message)
        self.param = param


def count(number: int, noun: str) -> str:
    """ "1 document", "2,000 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show(value: object) -> str:
    """A value for a message of one line: itself if it is short, else what it is."""
    text = repr(value)
    if len(text) <= 60 and "\n" not in text:
        return text
    return f"a text of {len(value):,} characters" if isinstance(value, str) else f"a {type(value).__name__}"


def unknown_name(what: str, name: str, known: Iterable[str], param: str | None = None) -> InputError:
    """The error for a name that is not among the known ones: it says which of them may have been meant, or lists them.

    what: the kind of thing that has names, such as "option".
    param: as in `InputError`.
    """
    names = list(known)
    close = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"
    return InputError(f"unknown {what} {name!r}; {hint}", param=param)
