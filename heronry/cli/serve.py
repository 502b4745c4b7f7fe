"""`heronry serve`: models for any client of OpenAI's API."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, show
from ..files import data_folder
from . import options

if TYPE_CHECKING:
    from ..engine.kept_states import KeptStates
    from ..stores.store import StateStore

CONVERSATIONS = 16 << 30  # bytes of their texts: more than anybody says
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A file, folder or name of any format, or NAME=PATH; repeatable. The first answers where a request "
            "names none.",
            show_default="bundled",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all, for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the first model with a LoRA, DoRA or MiSS adapter; repeatable.")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the first model from a tuned state on; repeatable.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="HERONRY_API_KEY", help="A key that clients must send, or NAME=KEY; repeatable."),
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(help="A file with a NAME=KEY a line.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which browsers may call the server; repeatable.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Sequences that are written at a time.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait; more are told 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 64 << 20,
    store: Annotated[
        str | None,
        typer.Option(
            help="A folder, or redis://HOST:PORT/0 for several servers, in which conversations, responses, states and "
            "the beginnings of prompts outlive the server; ram: nothing does.",
            show_default="a folder of the user's, without the beginnings of prompts",
        ),
    ] = None,
    store_size: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GB of responses and named states, and as many of the states of conversations.",
            show_default="10; 1 in RAM",
        ),
    ] = None,
    store_days: Annotated[float, typer.Option(min=0, help="Days without use after which a state is dropped.")] = 30,
    cache_size: Annotated[float, typer.Option(min=0, help="GB of the beginnings of prompts in the store.")] = 10.0,
    cache_ram: Annotated[
        float, typer.Option(min=0, help="GB of the beginnings of prompts in RAM, and as many of what is in the store.")
    ] = 1.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests have to end when it is stopped.")] = 30,
    log_level: Annotated[
        str, typer.Option(help="info: a line of JSON a request; warning: only what is wrong.")
    ] = "info",
) -> None:
    """Serve models to any client of OpenAI's API."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    keys = _read_keys(api_key or [], api_keys)
    if host not in LOOPBACK and not keys:
        print(f"heronry: anybody who reaches {host} may use this server; --api-key KEY asks for a key", file=sys.stderr)
    from ..engine.requests import Limits
    from ..engine.state_cache import StateCache
    from ..serve.app import create_app
    from ..serve.gate import LOCAL_HOSTS
    from ..serve.load import load_models
    from ..serve.run import bind, serve
    from .progress import progress_bar

    listening = bind(host, port)
    options.use_threads(threads)
    with progress_bar("loading") as progress:
        models = load_models(
            model or [],
            adapter or [],
            state or [],
            progress,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            quantize=quantize,
        )
    hosts = (*LOCAL_HOSTS, *(allow_host or ())) if host in LOOPBACK else tuple(allow_host or ("*",))
    limits = Limits(rows=max_rows, waiting=max_waiting)
    cached = _open_store(store, "prompts", round(cache_size * 1e9)) if store not in (None, "ram") else None
    kept, conversations = _open_kept(store, store_size, round(cache_ram * 1e9))
    app = create_app(
        models,
        limits=limits,
        keys=keys,
        hosts=hosts,
        max_body=max_body,
        drain=drain,
        cache=StateCache(round(cache_ram * 1e9), cached),
        kept=kept,
        conversations=conversations,
        keep_days=store_days,
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    def announce() -> None:
        names = ", ".join(models.by_name)
        print(f"{names} at {address}/v1 - try: curl {address}/v1/models", file=sys.stderr, flush=True)

    serve(app, listening, drain, log_level, announce)


def _read_keys(given: list[str], file: Path | None) -> dict[str, str]:
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


def _open_kept(place: str | None, size: float | None, ram_bytes: int) -> list[KeptStates]:
    """Responses and named states, and conversations. place, size: as on the command line; ram_bytes: of what is in a
    store elsewhere too."""
    from ..engine.kept_states import KeptStates

    if place is None:
        try:
            return _open_kept(str(data_folder() / "server"), size, ram_bytes)
        except (InputError, OSError) as error:
            print(f"heronry: {error}; conversations end with this server (--store FOLDER)", file=sys.stderr)
            place = "ram"
    max_bytes = round((size if size is not None else 1 if place == "ram" else 10) * 1e9)
    stores = _open_store(place, "kept", max_bytes), _open_store(place, "conversations", max_bytes, CONVERSATIONS)
    return [KeptStates(store, 0 if place == "ram" else ram_bytes) for store in stores]


def _open_store(place: str, part: str, max_bytes: int, max_about_bytes: int | None = None) -> StateStore:
    """A part of a store, so that what is kept never makes room for what is only convenient."""
    from ..stores.store import MAX_ABOUT_BYTES

    most = max_about_bytes or MAX_ABOUT_BYTES
    if place == "ram":
        from ..stores.memory import MemoryStore

        return MemoryStore(max_bytes)
    if "://" in place:
        from ..stores.redis import RedisStore

        return RedisStore(place, max_bytes, most, prefix=f"heronry:{part}:")
    from ..stores.disk import DiskStore

    return DiskStore(Path(place) / part, max_bytes, most)
