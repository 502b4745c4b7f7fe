"""The app: all routes, the gate in front of them, and the scheduler behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from .. import __version__
from ..engine.kept_states import KeptStates
from ..engine.requests import Limits
from ..engine.scheduler import Scheduler
from ..engine.state_cache import StateCache
from ..stores.memory import MemoryStore
from . import ai00, basics, chat, completions, embeddings, lightning, llama_cpp, metrics, responses, runner, states
from .errors import add_error_handlers
from .expiry import expire_now_and_then
from .gate import LOCAL_HOSTS, Gate
from .models import ModelTable
from .server import Server

ROUTERS = (
    basics.router,
    metrics.router,
    completions.router,
    chat.router,
    responses.router,
    states.router,
    embeddings.router,
    runner.router,
)
DIALECTS = (llama_cpp, lightning, ai00)  # with errors in a shape of their own


def _paths(router: APIRouter) -> list[str]:
    return [route.path for route in router.routes if isinstance(route, APIRoute)]


ERROR_SHAPES = {path: dialect.error_shape for dialect in DIALECTS for path in _paths(dialect.router)}
KEYS_IN_BODIES = _paths(lightning.router)


def create_app(
    models: ModelTable,
    *,
    limits: Limits | None = None,
    keys: Mapping[str, str] | None = None,
    hosts: Collection[str] = LOCAL_HOSTS,
    max_body: int = 64 << 20,
    drain: float = 30,
    cache: StateCache | None = None,
    kept: KeptStates | None = None,
    keep_days: float = 30,
) -> FastAPI:
    """
    Args:
        keys: API key -> the name of its owner; none: everybody may come in.
        hosts: see `Gate`.
        max_body: bytes of a request.
        drain: seconds that requests under way have to end when the server stops.
        cache: of states of prompts' beginnings; closed with the app.
        kept: states with names, whose store is closed with the app; None = 1 GB of RAM, which the app ends with.
        keep_days: days after which a state that nobody used is dropped.
    """
    scheduler, keys = Scheduler(limits), dict(keys or {})
    kept = KeptStates(MemoryStore(1 << 30)) if kept is None else kept

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        expiring = asyncio.create_task(expire_now_and_then(cache, kept.store, keep_days))
        yield
        expiring.cancel()
        scheduler.close(drain)
        if cache is not None:
            cache.close()
        kept.store.close()

    app = FastAPI(title="heronry", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = Server(models, scheduler, metrics.Metrics(scheduler), kept, cache, keys)
    for router in (*ROUTERS, *(dialect.router for dialect in DIALECTS)):
        app.include_router(router)
    add_error_handlers(app, ERROR_SHAPES)
    app.add_middleware(
        Gate, keys=keys, hosts=hosts, max_body=max_body, shapes=ERROR_SHAPES, keys_in_bodies=KEYS_IN_BODIES
    )
    return app
