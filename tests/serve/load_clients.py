"""Many streaming clients that cost little themselves: bytes from sockets, counted and not parsed."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Heard:
    """What one client got. status 0: the connection ended before an answer."""

    status: int = 0
    first: float = 0.0  # seconds to the first token
    whole: float = 0.0  # seconds to the end
    events: int = 0
    complete: bool = False  # it ended with a finish_reason and [DONE]


class _Client(asyncio.Protocol):
    """Reads one reply."""

    def __init__(self, request: bytes):
        self.request, self.heard, self.begin, self.tail = request, Heard(), time.perf_counter(), b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        heard = self.heard
        if not heard.status:
            heard.status = int(data[9:12])
        events = data.count(b"\ndata: {") + data.startswith(b"data: {")
        if events and not heard.events:
            heard.first = time.perf_counter() - self.begin
        heard.events += events
        self.tail = self.tail[-2000:] + data if len(data) < 2000 else data[-2000:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def stream(host: str, port: int, body: dict, leave_after: float | None = None) -> Heard:
    """Posts to /v1/completions and reads to the end. leave_after: seconds after which the client goes away."""
    data = json.dumps(body | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
    client = _Client(request)
    heard = client.heard
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: client, host, port)
    except ConnectionError:
        return heard
    try:
        await asyncio.wait([client.ended], timeout=leave_after)
    finally:
        transport.abort()
    heard.whole = time.perf_counter() - client.begin
    heard.complete = b'"finish_reason":"' in client.tail and b"data: [DONE]" in client.tail
    return heard


def prompt(i: int, words: int = 30) -> str:
    """Another one for each client."""
    random.seed(i)
    return "Once upon a time " + " ".join(
        random.choice(["a dog", "the girl", "ran", "saw", "red"]) for _ in range(words)
    )


async def load(host: str, port: int, clients: int, tokens: int, **options: object) -> tuple[float, list[Heard]]:
    """So many clients at once: the tokens a second of all, and what each got."""
    begin = time.perf_counter()
    bodies = [
        {"prompt": prompt(i), "max_tokens": tokens, "seed": i, "ignore_eos": True} | options for i in range(clients)
    ]
    heard = await asyncio.gather(*(stream(host, port, body) for body in bodies))
    seconds = time.perf_counter() - begin
    return sum(x.complete for x in heard) * tokens / seconds, list(heard)


def describe(rate: float, heard: Sequence[Heard]) -> str:
    """One line."""
    good = [x for x in heard if x.complete]
    firsts, wholes = [x.first for x in good], [x.whole for x in good]
    statuses = [x.status for x in heard]
    states = {status: statuses.count(status) for status in sorted(set(statuses))}
    return (
        f"{len(heard)} clients: {rate:.0f} tokens/s, first token after {statistics.median(firsts):.3f} s (at most "
        f"{max(firsts):.3f}), slowest over fastest {max(wholes) / min(wholes):.2f}, complete {len(good)}, {states}"
    )
