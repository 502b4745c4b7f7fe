"""The process in which chat templates from outside are rendered, see jinja_worker.py: one for all threads."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import InputError

PATIENCE = 5.0  # seconds for a request, the start of the process included
WORKER = Path(__file__).with_name("jinja_worker.py")


class JinjaProcess:
    """Starts the process when it is needed, and again after it was ended. A fork gets one of its own.

    A template that ended the process before it rendered anything is refused from then on, so its time is lost once. One
    that has rendered stays: it may have been the conversation, or a busy machine.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused: dict[str, str] = {}  # templates, and how they ended the process
        self._rendered: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that may talk to it

    def render(self, source: str, mark: str, *variables: dict[str, Any]) -> list[str]:
        """The texts that a template makes of several sets of variables, in PATIENCE seconds for all of them. mark: put
        at both ends of what {% generation %} encloses.

        Raises:
            InputError: the template is wrong, refuses the variables, or takes too long or too much memory.
        """
        request = json.dumps({"source": source, "mark": mark, "variables": variables}).encode() + b"\n"
        with self._lock:
            if source in self._refused:
                raise InputError(self._refused[source])
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(PATIENCE, process.kill)
            timer.start()
            line = b""
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:  # it was ended while it read
                pass
            finally:
                is_late = not timer.is_alive()
                timer.cancel()
                is_whole = line.endswith(b"\n")
                if not is_whole:  # also after Ctrl-C: its answer would be taken for that of the next request
                    self.close()
            if not is_whole:
                reason = f"takes longer than {PATIENCE:g} seconds" if is_late else "its process was ended"
                if source not in self._rendered:
                    self._refused[source] = reason
                raise InputError(reason)
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        self._rendered.add(source)
        texts: list[str] = answer["texts"]
        return texts

    def close(self) -> None:
        """Ends the process, if it runs and is ours."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
        return self._process


jinja_process = JinjaProcess()
atexit.register(jinja_process.close)
