"""A blocking generator for asyncio: every step runs in a thread, so that the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def iterate(
    begin: Callable[[], Generator[T, None, None]], cancel: Callable[[], object]
) -> AsyncGenerator[T, None]:
    """The items of the generator that `begin` returns.

    Cancelling the task that waits for an item calls `cancel`, waits for the step under way, and closes the generator:
    no thread is left that still computes.
    """
    generator = await _in_thread(begin, cancel)
    end = object()
    try:
        while (item := await _in_thread(partial(next, generator, end), cancel)) is not end:
            yield item
    finally:
        generator.close()


async def _in_thread(function: Callable[[], T], cancel: Callable[[], object]) -> T:
    """What the function returns, once it has: a cancelled task waits for it too."""

    def run() -> T:
        try:
            return function()
        except StopIteration as error:  # no future takes this one: whoever awaits it would wait for ever
            raise RuntimeError("a callback raised StopIteration") from error

    task = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancel()
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # cancelled again; the thread cannot be stopped
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not complain of it
        raise
