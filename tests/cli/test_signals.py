"""Ctrl-C, SIGTERM and SIGHUP end a command, whatever it is doing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from heronry.cli.signals import Terminated, signals_raise

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

TERMINATING = {signal.SIGTERM: 143, signal.SIGHUP: 129}


class Raising:
    """Sends a signal where Python drops every exception."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)
        for _ in range(10):  # a handler runs before the destructor is over
            pass


def end_of(function, *arguments) -> BaseException:
    """What the block ends with that calls a function and then waits for long."""
    try:
        with signals_raise():
            function(*arguments)
            time.sleep(60)
    except BaseException as error:
        return error
    raise AssertionError("it went on")


@pytest.mark.parametrize("number", TERMINATING)
def test_a_signal_ends_the_block(number):
    before = signal.getsignal(number), sys.unraisablehook
    end = end_of(signal.raise_signal, number)
    assert isinstance(end, Terminated)
    assert end.code == TERMINATING[number]
    assert (signal.getsignal(number), sys.unraisablehook) == before


@pytest.mark.parametrize("number", [*TERMINATING, signal.SIGINT])
def test_a_signal_in_a_destructor_is_not_lost(number):
    end = end_of(Raising, number)
    if number == signal.SIGINT:
        assert isinstance(end, KeyboardInterrupt)
    else:
        assert isinstance(end, Terminated)
        assert end.code == TERMINATING[number]


@pytest.mark.parametrize("error", [None, OSError("full"), KeyboardInterrupt()])
def test_a_signal_that_becomes_another_error_is_still_one(error):
    def terminate():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        if error is not None:
            raise error

    with pytest.raises(Terminated) as end, signals_raise():
        terminate()
    assert end.value.code == 143


def test_a_second_signal_lets_the_first_put_things_in_order():
    done = []

    def terminate():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            done.append("in order")

    with pytest.raises(Terminated), signals_raise():
        terminate()
    assert done == ["in order"]


def test_what_is_ignored_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("where", ["sys.meta_path", "atexit"])
def test_ctrl_c_before_and_after_a_command_shows_no_traceback(where):
    """While the command line is imported, and in what Python does at the exit."""
    code = (
        "import atexit, importlib.abc, signal, sys\n"
        "def press(*_): signal.raise_signal(signal.SIGINT)\n"
        "class Finder(importlib.abc.MetaPathFinder): find_spec = press\n"
        "from heronry.__main__ import main\n"
        "sys.argv = ['heronry', '--version']\n"
        f"{'sys.meta_path.insert(0, Finder())' if where == 'sys.meta_path' else 'atexit.register(press)'}\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
