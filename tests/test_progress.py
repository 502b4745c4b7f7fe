"""The bars of the command line, in a real terminal."""

from __future__ import annotations

import os
import pty
import select
import sys

import pytest

PROGRAM = """
import time
from heronry.cli.progress import progress_bar
with progress_bar("loading") as update:
    for done in range(1, {count} + 1):
        time.sleep({pause})
        update(done, {count})
print("ready")
"""


def on_a_terminal(program: str) -> str:
    """What a program writes to a terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", program])
    out = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            out += os.read(terminal, 1 << 16)
        except OSError:  # it has ended
            break
    os.waitpid(pid, 0)
    os.close(terminal)
    return out.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_a_bar_is_shown_for_what_takes_long_alone():
    long = on_a_terminal(PROGRAM.format(count=4, pause=0.3))
    assert "loading" in long
    assert "50%" in long
    assert long.rstrip().endswith("ready")
    assert "loading" not in on_a_terminal(PROGRAM.format(count=4, pause=0))
