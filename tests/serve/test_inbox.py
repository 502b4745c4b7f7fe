"""What other threads put into an inbox is taken out in the event loop, in order, and wakes it seldom."""

from __future__ import annotations

import asyncio
import threading

import pytest

from heronry.serve.generation import merge
from heronry.serve.inbox import Doorbell, Inbox


def test_one_call_wakes_the_loop_for_all_that_came():
    async def run() -> tuple[list[list[int]], int]:
        doorbell, calls = Doorbell(), []
        doorbell.loop = loop = asyncio.get_running_loop()
        inboxes = [Inbox(doorbell) for _ in range(3)]

        def put() -> None:
            for i in range(300):
                inboxes[i % 3].put(i)

        thread = threading.Thread(target=put)
        call_soon = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (calls.append(args), call_soon(*args))

        async def take(inbox: Inbox[int]) -> list[int]:
            return [await inbox.get() for _ in range(100)]

        waiting = [asyncio.ensure_future(take(inbox)) for inbox in inboxes]
        await asyncio.sleep(0)
        thread.start()
        thread.join()  # the loop stands still meanwhile
        return await asyncio.gather(*waiting), len(calls)

    found, calls = asyncio.run(run())
    assert found == [list(range(i, 300, 3)) for i in range(3)]
    assert calls == 1


def test_streams_side_by_side():
    closed = []

    async def count(i: int):
        try:
            for n in range(5):
                await asyncio.sleep(0)
                if (i, n) == (2, 4):
                    raise ValueError("broken")
                yield n
        finally:
            closed.append(i)

    async def run(streams: int) -> list[tuple[int, int]]:
        return [item async for item in merge([count(i) for i in range(streams)])]

    assert asyncio.run(run(1)) == [(0, n) for n in range(5)]
    assert sorted(asyncio.run(run(2))) == [(i, n) for i in range(2) for n in range(5)]
    closed.clear()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run(3))
    assert sorted(closed) == [0, 1, 2]
