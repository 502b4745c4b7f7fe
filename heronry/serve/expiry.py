"""Drops states that nobody has used for long."""

from __future__ import annotations

import asyncio
import time

from ..engine.state_store import StateStore

EVERY = 600  # seconds
KINDS = ("prefix", "response", "state")
ITEMS = 12  # times as long as the state of a response its items are kept, of which it can be read again


async def expire_now_and_then(store: StateStore, days: float) -> None:
    """Until it is cancelled. days: without use, after which a state goes."""
    while True:
        now, age = time.time(), days * 86400
        for kind in KINDS:
            await asyncio.to_thread(store.expire, kind, now - age, now - age * (ITEMS if kind == "response" else 1))
        await asyncio.sleep(EVERY)
