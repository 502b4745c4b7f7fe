"""The app: all routes, the gate in front of them, and the scheduler behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import torch
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
    llama_slots,
    metrics,
    page,
    responses,
    runner,
    states,
)
from .adapter_folder import AdapterFolder
from .conversations import router as conversation_router
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
    conversation_router,
    states.router,
    embeddings.router,
    adapters.vllm_router,
    runner.router,
    page.router,
)
LIGHTNING = (lightning.router, lightning_sessions.router, lightning_states.router, adapters.router)
DIALECTS = {  # with errors in a shape of their own
    llama_cpp.error_shape: (llama_cpp.router, llama_slots.router),
    lightning_bodies.error_shape: LIGHTNING,
    ai00.error_shape: (ai00.router, ai00_chat.router),
}


def _paths(router: APIRouter) -> list[str]:
    return [route.path for route in router.routes if isinstance(route, APIRoute)]


ERROR_SHAPES: dict[str, Shape] = {
    path: shape for shape, routers in DIALECTS.items() for router in routers for path in _paths(router)
}
KEYS_IN_BODIES = [path for router in (*LIGHTNING, chat.router) for path in _paths(router)]


def create_app(
    models: ModelTable,
    *,
    limits: Limits | None = None,
    keys: Mapping[str, str] | None = None,
    hosts: Collection[str] = LOCAL_HOSTS,
    max_body: int = 64 << 20,
    time_limit: float = 3600,
    drain: float = 30,
    cache: StateCache | None = None,
    kept: KeptStates | None = None,
    conversations: KeptStates | None = None,
    keep_days: float = 30,
    adapter_folder: Path | None = None,
) -> FastAPI:
    """
    Args:
        keys: API key -> the name of its owner; none: everybody may come in.
        hosts: see `Gate`.
        max_body: bytes of a request.
        time_limit: seconds that a request may take, its stream included.
        drain: seconds that requests under way have to end when the server stops.
        cache: of states of prompts' beginnings; closed with the app.
        kept: responses and states with names, whose store is closed with the app; None = 1 GB of RAM, which the app
            ends with.
        conversations: the same for them, apart, so that nothing else makes them go.
        keep_days: days after which a state that nobody used is dropped.
        adapter_folder: from which clients may load adapters.
    """
    scheduler, keys = Scheduler(limits), dict(keys or {})
    kept, conversations = (KeptStates(MemoryStore(1 << 30)) if x is None else x for x in (kept, conversations))
    folder = AdapterFolder(models, adapter_folder)
    server = Server(
        models,
        folder,
        scheduler,
        metrics.Metrics(scheduler, cache, next(iter(models.by_name))),
        kept,
        conversations,
        cache,
        keys,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.server.doorbell.loop = asyncio.get_running_loop()
        threads = torch.get_num_threads()
        scheduler.start()
        torch.set_num_threads(1)  # of every other thread from now on: see scheduler.py
        expiring = asyncio.create_task(expire_now_and_then(cache, kept.store, conversations.store, keep_days))
        yield
        expiring.cancel()
        if writing := server.writing:
            await asyncio.wait(writing, timeout=drain)
        scheduler.close(drain)
        server.grammars.close()
        if cache is not None:
            cache.close()
        kept.store.close()
        conversations.store.close()
        torch.set_num_threads(threads)

    app = FastAPI(title="heronry", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for router in ROUTERS:
        app.include_router(router)
    for routers in DIALECTS.values():
        for router in routers:
            app.include_router(router)
    add_error_handlers(app, ERROR_SHAPES)
    app.add_middleware(
        Gate,
        keys=keys,
        hosts=hosts,
        max_body=max_body,
        time_limit=time_limit,
        shapes=ERROR_SHAPES,
        keys_in_bodies=KEYS_IN_BODIES,
    )
    return app
