"""What commands print, and what the terminal does meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ..text.terminal import printable


def print_result(text: str, end: str = "\n", flush: bool = False) -> None:
    """Prints a result on standard output: as it is, but on a terminal without control characters."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=flush)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """The terminal does not show what is typed in the block, "^C" included: it would move the cursor amid what is being
    drawn. It is read later all the same."""
    if sys.platform == "win32":
        yield
        return
    import termios

    def set_echo(echo: bool) -> None:
        with contextlib.suppress(OSError, ValueError, termios.error):  # standard input is no terminal
            file = sys.stdin.fileno()
            if os.tcgetpgrp(file) == os.getpgrp():  # in the background this would stop the process
                mode = termios.tcgetattr(file)
                mode[3] = mode[3] | termios.ECHO if echo else mode[3] & ~termios.ECHO
                termios.tcsetattr(file, termios.TCSANOW, mode)

    set_echo(False)
    try:
        yield
    finally:
        set_echo(True)
