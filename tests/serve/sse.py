"""Streams of server-sent events."""

from __future__ import annotations

import json

import httpx


def events(reply: httpx.Response) -> list:
    """The data of all events of a stream; the last may be "[DONE]"."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    texts = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]
