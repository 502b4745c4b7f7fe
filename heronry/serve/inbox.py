"""From the scheduler's thread to the event loop.

Waking the loop costs more than taking a token in, so one call wakes it for all that came until it runs: as a rule that
is a whole step of a batch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Doorbell:
    """Wakes the receivers of one event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None  # once it runs
        self._called: deque[Inbox[Any]] = deque()
        self._rung = False

    def ring(self, inbox: Inbox[Any]) -> None:
        """Has the loop look into an inbox. On any thread."""
        self._called.append(inbox)
        if not self._rung and self.loop is not None and not self.loop.is_closed():
            self._rung = True
            self.loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # first: what comes from now on rings again
        while self._called:
            self._called.popleft().wake()


class Inbox(Generic[T]):
    """What came for one receiver, which takes it out in the event loop.

    items: that came and were not taken.
    """

    def __init__(self, doorbell: Doorbell):
        self.items: deque[T] = deque()
        self._doorbell = doorbell
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """On any thread."""
        self.items.append(item)
        self._doorbell.ring(self)

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> T:
        """The next item, once it is there."""
        while not self.items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.items.popleft()
