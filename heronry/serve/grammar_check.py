"""The grammars of clients are compiled in a process of their own first: it can be ended, where a thread cannot.

llguidance bounds most of what a grammar may cost, but not all: twenty patterns that must all match take it hours.
"""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from pathlib import Path

from ..engine.constraints import Grammar
from .errors import ApiError

SECONDS = 10.0  # that compiling may take
MEMORY = 2 << 30  # bytes of address space
KNOWN = 1000  # grammars that are not tried again
WORKER = Path(__file__).with_name("grammar_worker.py")


class GrammarCheck:
    """One process, started with the first grammar."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._known: OrderedDict[Grammar, None] = OrderedDict()
        self._process: asyncio.subprocess.Process | None = None
        self._free = asyncio.Lock()

    async def check(self, grammar: Grammar) -> None:
        """Returns once the grammar is known to be compiled in time.

        Raises:
            InputError: it is none, see `Grammar.definition`.
            ApiError: it takes too long, or too much memory.
        """
        if grammar in self._known:
            self._known.move_to_end(grammar)
            return
        definition = await asyncio.to_thread(grammar.definition)
        async with self._free:
            process = await self._idle_process()
            try:
                process.stdin.write(definition.encode() + b"\n")  # type: ignore[union-attr]
                answer = await asyncio.wait_for(process.stdout.readline(), self.seconds)  # type: ignore[union-attr]
            except BaseException as error:
                self.close()
                if isinstance(error, asyncio.TimeoutError):
                    raise ApiError(400, f"{grammar.kind}: compiling it takes longer than {self.seconds:g} s") from None
                raise
        if not answer:
            raise ApiError(400, f"{grammar.kind}: compiling it takes more than {MEMORY >> 30} GiB")
        self._known[grammar] = None
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)

    async def _idle_process(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
            command = (sys.executable, str(WORKER), str(MEMORY))
            self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=nowhere)
        return self._process

    def close(self) -> None:
        """Ends the process; another grammar starts another one."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None
