"""`heronry serve`: models for any client of OpenAI's API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options

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
    adapter_folder: Annotated[
        Path | None, typer.Option(help="A folder from which clients may load adapters.", show_default="no client may")
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
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a request may take, its stream included.")
    ] = 3600,
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
    replicas: Annotated[
        str | None,
        typer.Option(
            help="Copies of the server, on Ray: a number, or FEWEST-MOST for as many as there is work for.",
            show_default="this process alone",
        ),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(
            help="Where replicas run: local for a Ray of their own, auto for that of this machine, HOST:PORT."
        ),
    ] = "local",
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests have to end when it is stopped.")] = 30,
    log_level: Annotated[
        str, typer.Option(help="info: a line of JSON a request; warning: only what is wrong.")
    ] = "info",
) -> None:
    """Serve models to any client of OpenAI's API."""
    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"--log-level must be debug, info, warning or error, got {log_level!r}")
    from ..serve.gate import LOCAL_HOSTS
    from ..serve.load import served_names
    from ..serve.options import ServeOptions, open_app, read_keys
    from ..serve.run import bind, serve
    from .progress import progress_bar

    told = ServeOptions(
        model=model or [],
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        threads=threads,
        quantize=quantize,
        adapter=adapter or [],
        adapter_folder=adapter_folder,
        state=state or [],
        api_key=api_key or [],
        api_keys=api_keys,
        allow_host=allow_host or [],
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_body=max_body,
        time_limit=time_limit,
        store=store,
        store_size=store_size,
        store_days=store_days,
        cache_size=cache_size,
        cache_ram=cache_ram,
        drain=drain,
        log_level=log_level,  # type: ignore[arg-type]
    )
    if host not in LOOPBACK and not read_keys(told.api_key, told.api_keys):
        print(f"heronry: anybody who reaches {host} may use this server; --api-key KEY asks for a key", file=sys.stderr)
    listening = bind(host, port)
    hosts = (*LOCAL_HOSTS, *told.allow_host) if host in LOOPBACK else tuple(told.allow_host or ("*",))
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    def announce() -> None:
        names = ", ".join(served_names(told.model, told.adapter, told.state))
        print(
            f"{names} at {address}/v1 - try: curl {address}/v1/models, or open {address} to chat",
            file=sys.stderr,
            flush=True,
        )

    if replicas is not None:
        from ..serve.cluster.deploy import open_replicas

        with open_replicas(told, replicas, cluster, hosts) as app:
            serve(app, listening, drain, log_level, announce)
        return
    options.use_threads(threads)
    with progress_bar("loading") as progress:
        app = open_app(told, hosts, progress)
    serve(app, listening, drain, log_level, announce)
