"""The signals that end a command, as exceptions, so that what was begun is left in order."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # no SIGHUP on Windows


class Terminated(SystemExit):
    """A signal came; the code is what a shell shows for a program that it ended. line: what to say."""

    def __init__(self, number: int, line: str = "terminated"):
        super().__init__(128 + number)
        self.line = line


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the block Ctrl-C is a KeyboardInterrupt, and the first SIGTERM or SIGHUP a Terminated, with which the
    block ends whatever happens to it on the way. What is ignored stays ignored (nohup).

    An exception that comes in a destructor or in a callback of a weak reference is dropped by Python; it comes again
    a moment later.
    """
    came: list[int] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        if not came:  # a second one would disturb what is put in order after the first
            came.append(number)
            raise Terminated(number)

    def raise_again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Terminated | KeyboardInterrupt):
            number = came.pop() if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
            threading.Timer(0.01, _interrupt, [number]).start()
        else:
            hook(dropped)

    handlers = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(TERMINATING, terminate)}
    previous = {number: signal.getsignal(number) for number in handlers}
    previous = {number: handler for number, handler in previous.items() if handler != signal.SIG_IGN}
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        for number in previous:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        if came:
            raise Terminated(came[0])


def _interrupt(number: int) -> None:
    """Sends the main thread a signal, from another thread."""
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:  # ends a wait for input too
        signal.pthread_kill(threading.main_thread().ident or 0, number)
