"""Server-sent events, and answers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

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
) -> StreamingResponse:
    """A reply with these events, and `done` after them. An error before the first of them is an error of the reply;
    after it, it is the last event."""
    first = await anext(events, None)

    async def body() -> AsyncIterator[str]:
        try:
            if first is not None:
                yield first
            async for item in _with_signs_of_life(events):
                yield item
            yield done
        except Exception as error:
            yield event(error_shape(as_api_error(error)))
        finally:
            await events.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers=HEADERS)


async def _with_signs_of_life(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    task: asyncio.Task[str | None] | None = None
    try:
        while True:
            task = task or asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait([task], timeout=KEEP_ALIVE)
            if not done:
                yield ": keep-alive\n\n"
                continue
            item, task = task.result(), None
            if item is None:
                return
            yield item
    finally:
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """The answer; where the client goes away before, it is cancelled, and so is this."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise asyncio.CancelledError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait([task, gone])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
