"""One copy of the server's app, in a process that Ray starts, watches and replaces."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

import torch
from prometheus_client import Metric
from ray import serve
from starlette.types import Message

from ..options import ServeOptions, open_app
from ..server import Server


class Replica:
    """Takes requests as ASGI has them, and answers with the messages of a response."""

    async def __init__(self, options: dict[str, Any], elsewhere: list[str]) -> None:  # type: ignore[misc]
        """options: of `ServeOptions`. elsewhere: names of models that other replicas have."""
        told = ServeOptions(**options)
        logging.getLogger("heronry").setLevel(logging.WARNING)  # the front has a line for every request
        if told.threads is not None:
            torch.set_num_threads(told.threads)
        self._app = await asyncio.to_thread(open_app, told, ["*"])
        self._server: Server = self._app.state.server
        self._server.models.elsewhere = elsewhere
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._lifespan = AsyncExitStack()
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))

    async def __del__(self) -> None:
        """Called by Ray once no request is left."""
        await self._lifespan.aclose()

    def check_health(self) -> None:
        """Ray replaces a replica where this fails."""
        if not self._server.scheduler.is_alive():
            raise RuntimeError("the thread that runs the models has ended")

    def metrics(self) -> tuple[str, list[Metric]]:
        """Its name, and what Prometheus collects."""
        return self._name, list(self._server.metrics.registry.collect())

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[list[Message], None]:
        """The messages of a response, as many at a time as there are. Leaving it early is the client's going away."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", self._name.encode())]
            messages.put_nowait(message)

        task = asyncio.ensure_future(self._app(scope, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                batch = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    batch.append(message)
                yield batch
                if message is None:
                    break
        finally:
            gone.set()
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and task.exception() is not None:
                print(f"heronry: {task.exception()}", file=sys.stderr)
