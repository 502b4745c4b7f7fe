"""What all routes of one server share."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from ..engine.scheduler import Scheduler
from .models import ModelTable

if TYPE_CHECKING:
    from .metrics import Metrics


@dataclass(frozen=True)
class Server:
    """
    keys: API key -> the name of its owner; empty: no key is asked for.
    most_tokens: of an answer where a request does not say how many.
    """

    models: ModelTable
    scheduler: Scheduler
    metrics: Metrics
    keys: Mapping[str, str] = field(default_factory=dict)
    most_tokens: int = 4096


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
