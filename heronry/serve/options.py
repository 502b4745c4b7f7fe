"""What a server is told, and the app that this makes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ..engine.kept_states import KeptStates
from ..engine.requests import Limits
from ..engine.state_cache import StateCache
from ..errors import InputError, show
from ..progress import Progress
from ..stores.disk import DiskStore
from ..stores.memory import MemoryStore
from ..stores.redis import RedisStore
from ..stores.store import StateStore
from .app import create_app
from .load import load_models


class ServeOptions(BaseModel):
    """The options of `heronry serve` that make the app, under the same names; also in a config file of Ray Serve."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: list[str] = []
    tokenizer: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)
    quantize: str | None = None
    adapter: list[str] = []
    state: list[str] = []
    api_key: list[str] = []
    api_keys: Path | None = None
    allow_host: list[str] = []
    max_rows: int = Field(64, ge=1)
    max_waiting: int = Field(256, ge=1)
    max_body: int = Field(64 << 20, ge=1)
    store: str | None = None
    store_size: float | None = Field(None, ge=0)
    store_days: float = Field(30, ge=0)
    cache_size: float = Field(10.0, ge=0)
    cache_ram: float = Field(1.0, ge=0)
    drain: float = Field(30, ge=0)
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def open_app(options: ServeOptions, hosts: Collection[str], progress: Progress | None = None) -> FastAPI:
    """The app with its models and stores. hosts: see `Gate`.

    Raises:
        InputError: what cannot be loaded or opened.
    """
    keys = read_keys(options.api_key, options.api_keys)
    models = load_models(
        options.model,
        options.adapter,
        options.state,
        progress,
        tokenizer=options.tokenizer,
        dtype=options.dtype,
        device=options.device,
        quantize=options.quantize,
    )
    store, ram = options.store, round(options.cache_ram * 1e9)
    cache = StateCache(ram, open_store(store, "prompts", round(options.cache_size * 1e9)) if store else None)
    size = options.store_size if options.store_size is not None else 10 if store else 1
    kept_bytes = round(size * 1e9)
    if store:
        kept = KeptStates(open_store(store, "kept", kept_bytes), ram)
    else:
        kept = KeptStates(MemoryStore(kept_bytes))
    return create_app(
        models,
        limits=Limits(rows=options.max_rows, waiting=options.max_waiting),
        keys=keys,
        hosts=hosts,
        max_body=options.max_body,
        drain=options.drain,
        cache=cache,
        kept=kept,
        keep_days=options.store_days,
    )


def read_keys(given: Sequence[str], file: Path | None) -> dict[str, str]:
    """API key -> the name of its owner, which is that of its states: a key without a name has one of its own."""
    lines = list(given)
    if file is not None:
        try:
            lines += [line for line in file.expanduser().read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error})") from error
    keys: dict[str, str] = {}
    for line in lines:
        name, equals, key = line.strip().partition("=")
        name, key = (name, key) if equals else (f"key_{hashlib.sha256(name.encode()).hexdigest()[:32]}", name)
        if not key:
            raise InputError("an API key must not be empty")
        if not re.fullmatch(r"[\w.:@-]{1,128}", name, re.ASCII):
            raise InputError(f"{show(name)} cannot be the name of a key: use letters, digits and any of _ . : @ -")
        keys[key] = name
    return keys


def open_store(place: str, part: str, max_bytes: int) -> StateStore:
    """A part of a store, so that what is kept never makes room for what is only convenient."""
    if "://" in place:
        return RedisStore(place, max_bytes, prefix=f"heronry:{part}:")
    return DiskStore(Path(place) / part, max_bytes)
