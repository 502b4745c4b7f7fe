"""Brings replicas up: for `heronry serve --replicas`, and for a config file of Ray Serve."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...checkpoint import locate
from ...cluster import connect
from ...errors import InputError
from ...files import data_folder
from ..load import served_names, split_name
from ..options import ServeOptions, read_keys
from .front import open_front
from .replica import Replica

ROUTER = "heronry.serve.cluster.router.BoundedHashRouter"
RESERVED = 16  # requests that a replica takes when it is full: for its numbers
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def open_replicas(options: ServeOptions, replicas: str, cluster: str, hosts: Collection[str]) -> Iterator[ASGIApp]:
    """A front in this process, and replicas behind it, which end with the block.

    Args:
        replicas: how many of each model; "FEWEST-MOST": as many as there is work for.
        cluster: see `connect`.
        hosts: see `Gate`.

    Raises:
        InputError: no such cluster, a number that is none, or what the replicas cannot load or open.
    """
    scale = read_scale(replicas)
    if cluster.startswith("ray://"):
        raise InputError("--cluster ray:// cannot stream: run this on a machine of the cluster, with --cluster auto")
    if cluster != "local":
        _check_shared(options.store, "--store redis://HOST:PORT/0")
    served_names(options.model, options.adapter, options.state)
    for text in options.model:
        if (path := split_name(text)[1]) != "bundled":
            locate(path)  # Ray would try for long
    with ExitStack() as stack:
        if options.store is None:
            options = options.model_copy(update={"store": str(data_folder() / "server")})
        elif options.store == "ram":  # shared, and gone with the server
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="heronry-states-"))
            size = options.store_size if options.store_size is not None else 1.0
            options = options.model_copy(update={"store": folder, "store_size": size})
        connect(cluster, object_store_memory=max(256 << 20, 4 * options.max_body))
        stack.callback(ray.shutdown)
        options = _with_threads(options, scale, cluster)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        found: dict[str, DeploymentHandle[Any]] = {}
        for deployment, names in _bind(_anywhere(options), scale):
            name = f"heronry-{names[0]}"
            stack.callback(serve.delete, name)
            try:
                handle = serve.run(deployment, name=name, route_prefix=None)
            except RuntimeError as error:
                raise _why(name, error) from error
            found |= dict.fromkeys(names, handle)
        yield open_front(options, hosts, found)


def application(args: dict[str, Any]) -> serve.Application:
    """What a config file of Ray Serve imports; its deployments may be told there how many replicas they have.

    args: see `ServeOptions`. Every machine needs the models, adapters and files of keys under the same paths.
    """
    options = ServeOptions(**args)
    _check_shared(options.store, "store: redis://HOST:PORT/0")
    front = serve.deployment(name="front", max_ongoing_requests=1 << 16, ray_actor_options={"num_cpus": 0})(Ingress)
    deployments, names = zip(*_bind(options, {"num_replicas": 1}), strict=True)
    return front.bind(options.model_dump(mode="json"), names, *deployments)


class Ingress:
    """The front as a deployment, behind the HTTP servers of Ray."""

    def __init__(self, options: dict[str, Any], names: list[list[str]], *handles: DeploymentHandle[Any]):
        told = ServeOptions(**options)
        found = {name: handle for group, handle in zip(names, handles, strict=True) for name in group}
        self._app = open_front(told, told.allow_host or ["*"], found)

    async def __call__(self, request: Request) -> Response:
        return _Passed(self._app)


class _Passed(Response):
    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _check_shared(store: str | None, example: str) -> None:
    if store in (None, "ram"):
        raise InputError(f"replicas on several machines need a store that they share: {example}")


def read_scale(text: str) -> dict[str, Any]:
    """Options of a deployment from "2" or "1-4"; InputError for anything else."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= fewest <= most:
        raise InputError(f"--replicas must be a number or FEWEST-MOST, such as 2 or 1-4, got {text!r}")
    if found and found[2] is None:
        return {"num_replicas": fewest}
    return {"num_replicas": "auto", "autoscaling_config": {"min_replicas": fewest, "max_replicas": most}}


def _most(scale: Mapping[str, Any]) -> int:
    return int(scale["autoscaling_config"]["max_replicas"] if "autoscaling_config" in scale else scale["num_replicas"])


def _with_threads(options: ServeOptions, scale: Mapping[str, Any], cluster: str) -> ServeOptions:
    """On one machine the replicas share its cores."""
    if cluster != "local" or options.threads is not None:
        return options
    threads = (os.cpu_count() or 1) // (_most(scale) * max(1, len(options.model)))
    return options.model_copy(update={"threads": max(1, threads)})


def _anywhere(options: ServeOptions) -> ServeOptions:
    """With keys instead of files of them, and whole paths, for processes that run elsewhere."""

    def whole(text: str) -> str:
        name, path = split_name(text)
        path = str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path
        return path if name is None else f"{name}={path}"

    keys = [f"{name}={key}" for key, name in read_keys(options.api_key, options.api_keys).items()]
    update: dict[str, Any] = {"api_key": keys, "api_keys": None}
    update |= {part: [whole(text) for text in getattr(options, part)] for part in ("model", "adapter", "state")}
    if options.store is not None and "://" not in options.store:
        update["store"] = str(Path(options.store).expanduser().absolute())
    if options.tokenizer is not None:
        update["tokenizer"] = whole(options.tokenizer)
    return options.model_copy(update=update)


def _bind(options: ServeOptions, scale: Mapping[str, Any]) -> list[tuple[serve.Application, list[str]]]:
    """The deployment of each model, and the names that it answers to, its own first."""
    every = served_names(options.model, options.adapter, options.state)
    made = []
    for i, text in enumerate(options.model or ["bundled"]):
        own: dict[str, Any] = {"model": [text]} if i == 0 else {"model": [text], "adapter": [], "state": []}
        told = options.model_copy(update=own)
        names = served_names(told.model, told.adapter, told.state)
        elsewhere = [name for name in every if name not in names]
        made.append((_deployment(told, names[0], scale).bind(told.model_dump(mode="json"), elsewhere), names))
    return made


def _deployment(options: ServeOptions, name: str, scale: Mapping[str, Any]) -> serve.Deployment:
    """What a model's replicas have in common; a config file may say otherwise."""
    if "autoscaling_config" in scale:  # a batch that is nearly full: beyond it requests begin to wait
        target = {"target_ongoing_requests": max(1, options.max_rows * 3 // 4)}
        scale = {"num_replicas": "auto", "autoscaling_config": scale["autoscaling_config"] | target}
    gpus = 1 if options.device.startswith("cuda") else 0
    most = options.max_rows + options.max_waiting  # of a replica, which refuses more itself
    return serve.deployment(
        name=name,
        max_ongoing_requests=most + RESERVED,
        max_queued_requests=most,  # at a front: those that no replica has taken yet, in a burst nearly all
        graceful_shutdown_timeout_s=options.drain + 5,
        ray_actor_options={"num_cpus": options.threads or 1, "num_gpus": gpus},
        request_router_config={"request_router_class": ROUTER, "request_router_kwargs": {"most": most}},
        max_constructor_retry_count=1,  # what is wrong with the options stays wrong
        logging_config=QUIET,
        **scale,
    )(Replica)


def _why(name: str, error: RuntimeError) -> Exception:
    """What the replicas said is wrong with the options, where it was that."""
    deployments = serve.status().applications[name].deployments.values()
    said = "\n".join(deployment.message for deployment in deployments)
    found = re.findall(r"InputError: (.+)", said)
    return InputError(found[-1]) if found else error
