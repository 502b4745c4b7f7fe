"""A program in a real terminal, to type into."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    """`python ARGUMENTS` on a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 60, rows: int = 40, **environment: str):
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            own |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment
            os.execve(sys.executable, [sys.executable, *arguments], own)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.raw, self.seen = "", 0

    @property
    def text(self) -> str:
        """What was shown so far, without colours and movements."""
        return STYLE.sub("", self.raw).replace("\r", "")

    def wait(self, text: str, seconds: float = 60) -> str:
        """Reads until `text` is shown after what was waited for last; returns what came before it."""
        end = time.monotonic() + seconds
        while (at := self.text.find(text, self.seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.text[self.seen :]!r}"
            if select.select([self.file], [], [], 1)[0]:
                assert self._read(), f"no {text!r} in {self.text[self.seen :]!r}, and the program has ended"
        shown, self.seen = self.text[self.seen : at], at + len(text)
        return shown

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def paste(self, text: str) -> None:
        """As terminals do: between marks, with carriage returns."""
        self.type("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the program if it still runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.end()

    def end(self) -> int:
        """Waits for the end of the program, at most a minute; returns its exit code."""
        end = time.monotonic() + 60
        while not select.select([self.file], [], [], 1)[0] or self._read():
            assert time.monotonic() < end, f"it goes on: {self.text[-2000:]!r}"
        os.close(self.file)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def _read(self) -> bool:
        try:
            data = os.read(self.file, 1 << 16)
        except OSError:
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)
