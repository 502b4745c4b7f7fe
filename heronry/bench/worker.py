"""A contestant in a process of its own, so that contestants share neither thread pools nor memory.

Between jobs a worker waits without using the processor.
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

from ..memory import release_memory

MEMORY_FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}  # of /proc/self/status


class Contestant(NamedTuple):
    """kind(*options) imports the libraries and .load() loads the weights; its other methods return a job to time. Sizes
    in bytes that it has in a dictionary `own_sizes` are reported with its memory."""

    kind: type
    options: tuple[Any, ...] = ()


class ContestantError(Exception):
    """A contestant could not be loaded or run; the message is one line."""


class Worker:
    """A process that runs a contestant's jobs. load_seconds: the time to load the weights, without the libraries."""

    def __init__(self, contestant: Contestant):
        # takes what the libraries print
        self._log = tempfile.NamedTemporaryFile("r", prefix="heronry-bench-")  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_pipe, self._log.name, contestant), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: only the parent handles Ctrl-C
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        child_pipe.close()
        self.load_seconds: float = self._answer()

    def run(self, job: str, options: tuple[Any, ...]) -> float:
        """Seconds that the job takes; the first call also prepares it, which is not timed."""
        self._pipe.send((job, options))
        seconds: float = self._answer()
        return seconds

    def memory(self) -> dict[str, int]:
        """Bytes: "resident" now, "anonymous" of these (without mapped files), "peak" so far, where they are known; and
        the contestant's `own_sizes`."""
        self._pipe.send(None)
        sizes: dict[str, int] = self._answer()
        return sizes

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.terminate()  # if it is still in the middle of a long job
        self._process.join()
        self._log.close()

    def _answer(self) -> Any:
        try:
            kind, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            lines = [line for line in self._log.read().splitlines() if line.strip()] or ["no output"]
            raise ContestantError(f"died with exit code {self._process.exitcode}: {lines[-1][:200]}") from None
        if kind == "failed":
            raise ContestantError(answer)
        return answer


def _serve(pipe: Connection, log: str, contestant: Contestant) -> None:
    """The loop of the worker's process: load, then answer a job with its seconds and None with the memory."""
    log_file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    # importing this file imported PyTorch; a contestant that does without is not charged for its memory
    baseline = {} if getattr(contestant.kind, "needs_torch", True) else process_memory({})
    instance: Any = None
    jobs: dict[tuple[str, tuple[Any, ...]], Callable[[], object]] = {}

    def load() -> float:
        nonlocal instance
        instance = contestant.kind(*contestant.options)
        return _seconds(instance.load)

    def run() -> float:
        name, options = request
        if request not in jobs:
            jobs[request] = getattr(instance, name)(*options)
        return _seconds(jobs[request])

    pipe.send(_answer_or_failure(load))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the contest is over
        while True:
            request = pipe.recv()
            if request is None:
                pipe.send(("done", process_memory(baseline) | getattr(instance, "own_sizes", {})))
            else:
                pipe.send(_answer_or_failure(run))


def _answer_or_failure(work: Callable[[], float]) -> tuple[str, Any]:
    """("done", seconds), or ("failed", a line about the exception)."""
    try:
        return "done", work()
    except Exception as error:  # reported in the table; the other contestants continue
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        return "failed", f"{type(error).__name__}: {first_line[:200]}"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget_peak() -> bool:
    """Gives free memory back to the system and lets the "peak" of this process begin anew; False where only Linux can
    do that."""
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def process_memory(baseline: dict[str, int]) -> dict[str, int]:
    """The bytes of MEMORY_FIELDS of this process, less those in `baseline`; {} where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    sizes = {name: int(fields[key].split()[0]) * 1024 for name, key in MEMORY_FIELDS.items()}
    return {name: size - baseline.get("resident" if name == "peak" else name, 0) for name, size in sizes.items()}
