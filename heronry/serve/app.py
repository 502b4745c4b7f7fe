"""The app: all routes, the gate in front of them, and the scheduler behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from ..engine.requests import Limits
from ..engine.scheduler import Scheduler
from ..engine.state_cache import StateCache
from . import basics, chat, completions, embeddings, metrics
from .errors import add_error_handlers
from .gate import LOCAL_HOSTS, Gate
from .models import ModelTable
from .server import Server

ROUTERS = (basics.router, metrics.router, completions.router, chat.router, embeddings.router)


def create_app(
    models: ModelTable,
    *,
    limits: Limits | None = None,
    keys: Mapping[str, str] | None = None,
    hosts: Collection[str] = LOCAL_HOSTS,
    max_body: int = 64 << 20,
    drain: float = 30,
    cache: StateCache | None = None,
) -> FastAPI:
    """
    Args:
        keys: API key -> the name of its owner; none: everybody may come in.
        hosts: see `Gate`.
        max_body: bytes of a request.
        drain: seconds that requests under way have to end when the server stops.
        cache: of states; closed with the app.
    """
    scheduler = Scheduler(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        scheduler.close(drain)
        if cache is not None:
            cache.close()

    app = FastAPI(title="heronry", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = Server(models, scheduler, metrics.Metrics(scheduler), cache)
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    app.add_middleware(Gate, keys=keys or {}, hosts=hosts, max_body=max_body)
    return app
