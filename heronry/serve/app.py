"""The app: all routes, the gate in front of them, and the scheduler behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from .. import __version__
from ..engine.kept_states import KeptStates
from ..engine.requests import Limits
from ..engine.scheduler import Scheduler
from ..engine.state_cache import StateCache
from ..stores.memory import MemoryStore
from . import (
    adapters,
    ai00,
    ai00_chat,
    basics,
    chat,
    completions,
    embeddings,
    lightning,
    lightning_bodies,
    lightning_sessions,
    lightning_states,
    llama_cpp,
    metrics,
    responses,
    runner,
    states,
)
from .adapter_folder import AdapterFolder
from .errors import Shape, add_error_handlers
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
    adapters.vllm_router,
    runner.router,
)
LIGHTNING = (lightning.router, lightning_sessions.router, lightning_states.router, adapters.router)
DIALECTS = {  # with errors in a shape of their own
    llama_cpp.error_shape: (llama_cpp.router,),
    lightning_bodies.error_shape: LIGHTNING,
    ai00.error_shape: (ai00.router, ai00_chat.router),
}


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
    adapter_folder: Path | None = None,
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
        adapter_folder: from which clients may load adapters.
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
    folder = AdapterFolder(models, adapter_folder)
    app.state.server = Server(models, folder, scheduler, metrics.Metrics(scheduler), kept, cache, keys)
    shapes: dict[str, Shape] = {}
    for router in ROUTERS:
        app.include_router(router)
    for shape, routers in DIALECTS.items():
        for router in routers:
            app.include_router(router)
            shapes |= dict.fromkeys(_paths(router), shape)
    add_error_handlers(app, shapes)
    in_bodies = [path for router in (*LIGHTNING, chat.router) for path in _paths(router)]
    app.add_middleware(Gate, keys=keys, hosts=hosts, max_body=max_body, shapes=shapes, keys_in_bodies=in_bodies)
    return app


def _paths(router: APIRouter) -> list[str]:
    return [route.path for route in router.routes if isinstance(route, APIRoute)]
