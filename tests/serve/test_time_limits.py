"""Requests that take too long, and bodies that never come whole."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from heronry.serve import gate
from heronry.serve.errors import add_error_handlers


def ask(path: str, *body: bytes, whole: bool = True) -> tuple[int, list[bytes]]:
    """The status and the pieces of a reply, 0.2 s being what a request may take."""
    app = FastAPI()
    add_error_handlers(app, {})
    app.add_middleware(gate.Gate, keys={}, hosts="*", max_body=100, time_limit=0.2, shapes={}, keys_in_bodies=())

    @app.post("/slow")
    async def slow():
        await asyncio.sleep(100)

    @app.post("/stream")
    async def stream():
        async def pieces():
            yield "data: 1\n\n"
            await asyncio.sleep(100)

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.post("/body")
    async def read(request: Request):
        return len(await request.body())

    arrived = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    if whole:
        arrived.append({"type": "http.request", "body": b"", "more_body": False})
    sent = []

    async def receive():
        if arrived:
            return arrived.pop(0)
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    async def run():
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await app(scope | {"headers": [(b"host", b"localhost")], "root_path": ""}, receive, send)

    asyncio.run(run())
    assert sent[-1].get("more_body", False) is False
    return sent[0]["status"], [message["body"] for message in sent[1:] if message["body"]]


def test_a_request_that_takes_too_long():
    status, [body] = ask("/slow")
    assert (status, json.loads(body)["error"]["message"]) == (504, "the request has taken longer than 0.2 s")


def test_a_stream_says_so_in_its_last_event():
    status, [first, last] = ask("/stream")
    assert (status, first) == (200, b"data: 1\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "the request has taken longer than 0.2 s"


def test_a_body_that_stops_coming(monkeypatch):
    monkeypatch.setattr(gate, "PAUSE", 0.05)
    assert ask("/body", b"ab", b"c") == (200, [b"3"])
    status, [body] = ask("/body", b"ab", whole=False)
    assert (status, json.loads(body)["error"]["message"]) == (408, "nothing more of the body has come for 0.05 s")


@pytest.mark.parametrize("whole", [True, False])
def test_a_body_that_is_too_large(whole):
    status, [body] = ask("/body", b"x" * 60, b"x" * 60, whole=whole)
    assert (status, json.loads(body)["error"]["message"]) == (413, "the body is larger than 100 bytes")
