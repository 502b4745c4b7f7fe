"""A contestant in a process of its own, so that neither thread pools nor memory of one meet those of another.

Between the jobs it is sent a worker waits for the next one without using the processor.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}  # of /proc/self/status


class Contestant(NamedTuple):
    """kind(*options) brings in the libraries, .load() the weights; its other methods return a job: what is timed."""

    kind: type
    options: tuple[Any, ...] = ()


class Failed(Exception):
    """A contestant that could not be loaded or run, in one line."""


class Worker:
    """load_seconds: of the weights; libraries were there before."""

    def __init__(self, contestant: Contestant):
        # what the libraries print
        self._log = tempfile.NamedTemporaryFile("r", prefix="heronry-bench-")  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, self._log.name, contestant), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: whoever started the run answers Ctrl-C
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        there.close()
        self.load_seconds: float = self._answer()

    def run(self, job: str, options: tuple[Any, ...]) -> float:
        """Seconds that the job takes; the first call prepares it too, outside of the time."""
        self._pipe.send((job, options))
        return self._answer()

    def memory(self) -> dict[str, int]:
        """Bytes: "resident" now, "anonymous" of these (files that are mapped left out), "peak" so far."""
        self._pipe.send(None)
        return self._answer()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.terminate()  # in the middle of a long job
        self._process.join()
        self._log.close()

    def _answer(self) -> Any:
        try:
            kind, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            said = [line for line in self._log.read().splitlines() if line.strip()] or ["without a word"]
            raise Failed(f"died with exit code {self._process.exitcode}: {said[-1][:200]}") from None
        if kind == "failed":
            raise Failed(answer)
        return answer


def _serve(pipe: Connection, log: str, contestant: Contestant) -> None:
    printed = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    # this very file brought torch in; who does without it is not charged with its memory
    before = {} if getattr(contestant.kind, "needs_torch", True) else _memory({})
    runner: Any = None
    jobs: dict[tuple[str, tuple[Any, ...]], Any] = {}

    def load() -> float:
        nonlocal runner
        runner = contestant.kind(*contestant.options)
        return _seconds(runner.load)

    def run() -> float:
        name, options = asked
        if asked not in jobs:
            jobs[asked] = getattr(runner, name)(*options)
        return _seconds(jobs[asked])

    pipe.send(_tried(load))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the run is over
        while True:
            asked = pipe.recv()
            pipe.send(("done", _memory(before)) if asked is None else _tried(run))


def _tried(work: Callable[[], float]) -> tuple[str, Any]:
    try:
        return "done", work()
    except Exception as error:  # told in the table; the other contestants go on
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return "failed", f"{type(error).__name__}: {first[:200]}"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(before: dict[str, int]) -> dict[str, int]:
    """What was added since `before`."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return {}
    found = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now = {name: int(found[key].split()[0]) * 1024 for name, key in FIELDS.items()}
    return {name: size - before.get("resident" if name == "peak" else name, 0) for name, size in now.items()}
