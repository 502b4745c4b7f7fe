"""What all routes of one server share."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from fastapi import Request

from ..engine.kept_states import KeptStates
from ..engine.prefix_keys import CacheRoot, cache_root
from ..engine.scheduler import Scheduler
from ..engine.state_cache import StateCache
from .models import ModelTable, ServedModel

if TYPE_CHECKING:
    from .metrics import Metrics


@dataclass(frozen=True)
class Server:
    """
    cache: of the states of prompts' beginnings.
    kept: states with names, of responses and others. conversations: trees of messages, with theirs.
    keys: API key -> the name of its owner; empty: no key is asked for.
    most_tokens: of an answer where a request does not say how many.
    writing: answers that are kept whether anybody waits for them or not.
    locks: of conversations, by id.
    """

    models: ModelTable
    scheduler: Scheduler
    metrics: Metrics
    kept: KeptStates
    conversations: KeptStates
    cache: StateCache | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    most_tokens: int = 4096
    writing: set[asyncio.Future[None]] = field(default_factory=set)
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    roots: dict[tuple[str, str], CacheRoot] = field(default_factory=dict)

    def root_of(self, model: ServedModel, owner: str) -> CacheRoot:
        """Where the keys of kept states begin: those of one owner are never found by another."""
        key = model.name, owner
        if key not in self.roots:
            self.roots[key] = cache_root(model.speaker.model, model.speaker.start, salt=owner)
        return self.roots[key]


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server


def owner_of(request: Request) -> str:
    """The owner of the key of a request; "" where no keys are asked for."""
    owner: str = request.state.owner
    return owner


def new_id(kind: str) -> str:
    """An id that nobody guesses: 128 random bits."""
    return f"{kind}-{secrets.token_hex(16)}"
