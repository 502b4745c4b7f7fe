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


async def stream(host: str, port: int, body: dict, leave_after: float | None = None) -> Heard:
    """Posts to /v1/completions and reads to the end. leave_after: seconds after which the client goes away."""
    heard, begin = Heard(), time.perf_counter()
    data = json.dumps(body | {"stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        tail = b""
        while True:
            left = None if leave_after is None else leave_after - (time.perf_counter() - begin)
            piece = await asyncio.wait_for(reader.read(1 << 16), left)
            if not piece:
                break
            if not heard.status:
                heard.status = int(piece[9:12])
            events = piece.count(b"\ndata: {") + piece.startswith(b"data: {")
            if events and not heard.events:
                heard.first = time.perf_counter() - begin
            heard.events += events
            tail = (tail + piece)[-2000:]
        heard.complete = b'"finish_reason":"' in tail and b"data: [DONE]" in tail
    except (TimeoutError, asyncio.TimeoutError, ConnectionError):
        pass
    finally:
        heard.whole = time.perf_counter() - begin
        writer.close()
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
