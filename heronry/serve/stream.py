"""Server-sent events, and answers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .errors import Shape, as_api_error, openai_shape

T = TypeVar("T")
KEEP_ALIVE = 15  # seconds without an event, after which proxies and clients hear that all is well
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """One event; name: of those that have one."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def stream_events(
    events: AsyncGenerator[str, None], done: str = DONE, error_shape: Shape = openai_shape
) -> Response:
    """A reply with these events, and `done` after them. An error before the first of them is an error of the reply;
    after it, it is the last event."""
    first = await anext(events, None)
    return _EventStream(first, events, done, error_shape)


class _EventStream(Response):
    """Sends each event as it comes, with no task of its own: at thousands of tokens a second that counts. The events
    are closed when the client goes away."""

    def __init__(self, first: str | None, events: AsyncGenerator[str, None], done: str, error_shape: Shape):
        super().__init__(media_type="text/event-stream", headers=HEADERS)
        del self.headers["content-length"]
        self.first, self.events, self.done, self.error_shape = first, events, done, error_shape
        self.sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        tasks = [asyncio.ensure_future(x) for x in (self._send_all(send), _disconnected(receive), self._ping(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _send_all(self, send: Send) -> None:
        try:
            await self._send(send, self.first or "")
            async for item in self.events:
                await self._send(send, item)
            await self._send(send, self.done)
        except Exception as error:
            await self._send(send, event(self.error_shape(as_api_error(error))))
        finally:
            await self.events.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, text: str) -> None:
        self.sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _ping(self, send: Send) -> None:
        """While nothing comes, as in a long prompt, proxies and clients hear that all is well."""
        while True:
            await asyncio.sleep(KEEP_ALIVE)
            if time.monotonic() - self.sent_at >= KEEP_ALIVE:
                await self._send(send, ": keep-alive\n\n")


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """The answer; where the client goes away before, it is cancelled, and so is this."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise asyncio.CancelledError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait([task, gone])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
