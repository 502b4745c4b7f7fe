"""Many clients at once: each is served whole or told to come again, and nothing is left of them."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from load_clients import load, stream
from server_process import Process
from soak import rows, soak


def address(server: Process) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def test_64_clients_are_served_as_one_is(server, http):
    _, heard = asyncio.run(load(*address(server), 64, 12))
    assert [x.status for x in heard] == [200] * 64
    assert all(x.complete for x in heard)
    assert rows(server) == 0


def test_of_200_clients_none_is_cut(start):
    server = start("--max-rows", "16", "--max-waiting", "40", "--log-level", "warning")
    _, heard = asyncio.run(load(*address(server), 200, 8))
    served = [x for x in heard if x.status == 200]
    assert all(x.complete for x in served)
    assert {x.status for x in heard} == {200, 429}
    assert len(served) >= 40

    async def refused() -> httpx.Response:
        """A reply while the queue is full."""
        endless = {"prompt": "Once", "max_tokens": 10**6, "ignore_eos": True}
        many = []
        async with httpx.AsyncClient(base_url=server.url) as http:
            for what, n in (("decoding", 16), ("waiting", 40)):
                many += [asyncio.ensure_future(stream(*address(server), endless)) for _ in range(n)]
                while (await http.get("/health")).json()[what] < n:
                    await asyncio.sleep(0.02)
            found = await http.post("/v1/completions", json=endless)
        for task in many:
            task.cancel()
        await asyncio.wait(many)
        return found

    reply = asyncio.run(refused())
    assert reply.status_code == 429
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert reply.json()["error"]["type"] == "rate_limit_error"
    deadline = time.monotonic() + 10
    while rows(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows(server) == 0
    server.stop()


@pytest.mark.slow
def test_a_short_soak(start):
    """The long one is `make soak`."""
    server = start("--log-level", "warning", "--max-rows", "8")
    counts, memory = asyncio.run(soak(server, 1.5, clients=8))
    assert counts["cut"] == 0
    assert counts["complete"] > 2
    assert min(memory) > 50
    deadline = time.monotonic() + 10
    while rows(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows(server) == 0
    server.stop()
