"""What a server is told, and the app that this makes."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ..engine.kept_states import KeptStates
from ..engine.requests import Limits
from ..engine.state_cache import StateCache
from ..errors import InputError, show
from ..files import data_folder
from ..progress import Progress
from ..stores.disk import DiskStore
from ..stores.memory import MemoryStore
from ..stores.redis import RedisStore
from ..stores.store import MAX_ABOUT_BYTES, StateStore
from .app import create_app
from .load import load_models

CONVERSATIONS = 16 << 30  # bytes of their texts: more than anybody says
LEAST_PADDED = 16  # characters of a key that ends in one =


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
    adapter_folder: Path | None = None
    state: list[str] = []
    api_key: list[str] = []
    api_keys: Path | None = None
    allow_host: list[str] = []
    max_rows: int = Field(64, ge=1)
    max_waiting: int = Field(256, ge=1)
    max_body: int = Field(64 << 20, ge=1)
    time_limit: float = Field(3600, ge=0.1)
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
    keys, folder = read_keys(options.api_key, options.api_keys), options.adapter_folder
    if folder is not None and not folder.expanduser().is_dir():
        raise InputError(f"{folder}: there is no such folder; --adapter-folder takes one with adapters")
    with ThreadPoolExecutor(1) as loader:  # its team of threads ends with it: see scheduler.py
        models = loader.submit(
            load_models,
            options.model,
            options.adapter,
            options.state,
            progress,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            device=options.device,
            quantize=options.quantize,
        ).result()
    place, ram = options.store, round(options.cache_ram * 1e9)
    cached = open_store(place, "prompts", round(options.cache_size * 1e9)) if place not in (None, "ram") else None
    kept, conversations = open_kept(place, options.store_size, ram)
    return create_app(
        models,
        limits=Limits(rows=options.max_rows, waiting=options.max_waiting),
        keys=keys,
        hosts=hosts,
        max_body=options.max_body,
        time_limit=options.time_limit,
        drain=options.drain,
        cache=StateCache(ram, cached),
        kept=kept,
        conversations=conversations,
        keep_days=options.store_days,
        adapter_folder=options.adapter_folder,
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
        name, key = _split_key(line.strip())
        if not re.fullmatch(r"[\w.:@-]{1,128}", name, re.ASCII):
            raise InputError(f"{show(name)} cannot be the name of a key: use letters, digits and any of _ . : @ -")
        keys[key] = name
    return keys


def _split_key(text: str) -> tuple[str, str]:
    """The name and the key of NAME=KEY. Where nothing but "=" comes behind the first "=", that is the padding of a key
    in base64 without a name; but not in a short text with one "=", such as the ann= of a variable that is not set."""
    name, _, key = text.partition("=")
    if key.strip("="):
        return name, key
    if not name or (text == f"{name}=" and len(text) < LEAST_PADDED):
        of = f" of {show(name)}" if name else ""
        raise InputError(f"the API key{of} must not be empty; expected KEY or NAME=KEY")
    return f"key_{hashlib.sha256(text.encode()).hexdigest()[:32]}", text


def open_kept(place: str | None, size: float | None, ram_bytes: int) -> list[KeptStates]:
    """Responses and named states, and conversations. place, size: as in the options; ram_bytes: of what is in a store
    elsewhere too."""
    if place is None:
        try:
            return open_kept(str(data_folder() / "server"), size, ram_bytes)
        except (InputError, OSError) as error:
            print(f"heronry: {error}; conversations end with this server (--store FOLDER)", file=sys.stderr)
            place = "ram"
    max_bytes = round((size if size is not None else 1 if place == "ram" else 10) * 1e9)
    stores = open_store(place, "kept", max_bytes), open_store(place, "conversations", max_bytes, CONVERSATIONS)
    return [KeptStates(store, 0 if place == "ram" else ram_bytes) for store in stores]


def open_store(place: str, part: str, max_bytes: int, max_about_bytes: int = MAX_ABOUT_BYTES) -> StateStore:
    """A part of a store, so that what is kept never makes room for what is only convenient."""
    if place == "ram":
        return MemoryStore(max_bytes)
    if "://" in place:
        return RedisStore(place, max_bytes, max_about_bytes, prefix=f"heronry:{part}:")
    return DiskStore(Path(place) / part, max_bytes, max_about_bytes)
