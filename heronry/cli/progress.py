"""What commands show on standard error besides errors: bars for what takes long, and a last line."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..text.terminal import printable
from .output import no_echo

PATIENCE = 0.5  # seconds before a bar is shown


class Update(Protocol):
    """Moves a bar."""

    def __call__(self, done: int, total: int | None, description: str | None = None) -> None: ...


@contextmanager
def progress_bar(description: str, in_bytes: bool = False) -> Iterator[Update]:
    """A function to call with (done, in all). On a terminal there is a bar on standard error once PATIENCE is over,
    which is removed at the end; so a refusal, which comes before, is not preceded by one."""
    console = stderr()
    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal or console.quiet)
    task = bar.add_task(printable(description), total=None)

    def update(done: int, total: int | None, description: str | None = None) -> None:
        bar.update(task, completed=done, total=total, description=description)

    if bar.disable:
        yield update
        return
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    with no_echo():
        timer.start()
        try:
            yield update
        finally:
            timer.cancel()
            timer.join()
            bar.stop()


def note(line: str) -> None:
    """Prints a line on standard error; nothing after --quiet."""
    stderr().print(printable(line))


def stderr() -> Console:
    """Standard error; silent after --quiet."""
    quiet = logging.getLogger("heronry").getEffectiveLevel() > logging.WARNING
    return Console(stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)
