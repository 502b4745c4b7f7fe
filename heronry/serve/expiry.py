"""Drops states that nobody has used for long."""

from __future__ import annotations

import asyncio
import time

from ..engine.state_cache import StateCache
from ..stores.store import StateStore
from . import conversation_store, kept_responses, lightning_sessions, llama_slots, named_states

EVERY = 600  # seconds
ITEMS = 12  # times as long as the state of a response or session its text is kept, of which it can be read again


async def expire_now_and_then(
    cache: StateCache | None, kept: StateStore, conversations: StateStore, days: float
) -> None:
    """Until it is cancelled. days: without use, after which a state goes; what was said in conversations stays."""
    while True:
        now, age = time.time(), days * 86400
        if cache is not None:
            await asyncio.to_thread(cache.expire, now - age)
        for kind in (named_states.KIND, llama_slots.KIND):
            await asyncio.to_thread(kept.expire, kind, now - age, now - age)
        for kind in (kept_responses.KIND, lightning_sessions.KIND, lightning_sessions.NUMBERS):
            await asyncio.to_thread(kept.expire, kind, now - age, now - ITEMS * age)
        await asyncio.to_thread(conversations.expire, conversation_store.MESSAGE, now - age, 0)
        await asyncio.sleep(EVERY)
