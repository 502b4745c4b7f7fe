"""The command line in a process of its own where something is wrong with the machine: forked from one that has imported
everything, so that it costs a tenth of a second."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

HEAVY = ["heronry.cli.app", "heronry.cli.chat_loop", "heronry.engine.llm", "heronry.convert", "heronry.evaluate"]
HEAVY += ["heronry.cli.progress", "heronry.cli.copies", "heronry.data.tokenize_corpus", "heronry.quantization"]


@dataclass
class Done:
    code: int  # as a shell shows it
    out: str
    err: str

    def is_refusal(self, *parts: str) -> None:
        """One line and exit code 2."""
        assert (self.code, self.err.count("\n")) == (2, 1), self
        assert self.err.startswith("heronry: "), self
        for part in parts:
            assert part in self.err, self


def run(
    folder: Path,
    *words: object,
    file_size: int | None = None,
    memory: int | None = None,
    stdin: str | None = "",
    stdout: str | None = None,
    stderr: str | None = None,
    kill: tuple[int, str] | None = None,
) -> Done:
    """Runs `heronry WORDS` in a folder.

    Args:
        file_size: bytes that a file may have at most.
        memory: bytes that the process may take beyond those it has.
        stdin, stdout, stderr: a text, or the path of a file; "closed"; "pipe" that nobody reads.
        kill: a signal, and the text on standard output or standard error after which it comes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    for name in ("out", "err", "in"):
        (folder / f".{name}").write_text(stdin or "" if name == "in" else "")
    limits = (file_size, memory)
    process = context.Process(target=_run, args=(folder, [*map(str, words)], limits, stdin, stdout, stderr))
    process.start()
    if kill is not None:
        threading.Thread(target=_kill, args=(process, folder, *kill)).start()
    process.join()
    code = process.exitcode
    assert code is not None
    return Done(128 - code if code < 0 else code, (folder / ".out").read_text(), (folder / ".err").read_text())


def _run(folder: Path, words: list[str], limits: tuple, stdin: str | None, stdout: str | None, stderr: str | None):
    os.chdir(folder)
    for number, given, name in ((0, stdin, "in"), (1, stdout, "out"), (2, stderr, "err")):
        if given == "pipe":
            reader, file = os.pipe()
            os.close(reader)
        else:
            path = given if given is not None and given.startswith("/dev") else f".{name}"
            file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
        if given == "closed":
            os.close(number)
    sys.stdin = None if stdin == "closed" else os.fdopen(0, closefd=False)
    sys.stdout = None if stdout == "closed" else os.fdopen(1, "w", closefd=False)
    sys.stderr = None if stderr == "closed" else os.fdopen(2, "w", 1, closefd=False)
    sys.argv = ["heronry", *words]
    file_size, memory = limits
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if memory is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from heronry.cli.app import main

    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120  # as the interpreter does
    os._exit(code)


def _kill(process: BaseProcess, folder: Path, number: int, text: str) -> None:
    while text not in (folder / ".out").read_text() + (folder / ".err").read_text():
        if not process.is_alive():
            return
        time.sleep(0.01)
    os.kill(process.pid, number)


def refused(done: tuple[int, str, str], message: str) -> None:
    """What the fixture `command` returns is one line and exit code 2."""
    code, out, err = done
    assert (code, out) == (2, ""), done
    assert err.startswith("heronry: "), err
    assert err.count("\n") == 1, err
    assert message in err
