"""What clients of a cluster talk to: passes each request to a replica, and back what that says, piece by piece."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...engine.requests import Busy
from ..app import ERROR_SHAPES, KEYS_IN_BODIES
from ..errors import ApiError, as_api_error, openai_shape
from ..gate import Gate
from ..models import MISDIRECTED
from ..options import ServeOptions, read_keys
from ..stream import event, while_connected
from .affinity import affinity

log = logging.getLogger("heronry.serve")
SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
Handle: TypeAlias = DeploymentHandle[Any]
LOST = (RayActorError, ReplicaUnavailableError)
HEALTH = ("/health", "/v1/health", "/ping")
MODELS = ("/v1/models", "/models", "/api/oai/models", "/api/oai/v1/models")
PATIENCE = 5.0  # seconds for all replicas to say how they are


def open_front(options: ServeOptions, hosts: Collection[str], deployments: Mapping[str, Handle]) -> ASGIApp:
    """A `Front` behind the gate of a server with these options."""
    return Gate(
        Front(deployments),
        keys=read_keys(options.api_key, options.api_keys),
        hosts=hosts,
        max_body=options.max_body,
        time_limit=options.time_limit,
        shapes=ERROR_SHAPES,
        keys_in_bodies=KEYS_IN_BODIES,
    )


class _Reply(NamedTuple):
    """One that has begun."""

    is_stream: bool  # of events


class Front:
    """An ASGI app without a model."""

    def __init__(self, deployments: Mapping[str, Handle]):
        """deployments: name of a model -> where it is; the first answers where a request names none."""
        self._deployments = deployments
        self._distinct = list({handle.deployment_id: handle for handle in deployments.values()}.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request, path = Request(scope, receive), scope["path"]
        try:
            if path in HEALTH:
                await JSONResponse(await self._health())(scope, receive, send)
            elif path == "/metrics":
                await Response(await self._metrics(), media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
            elif path in MODELS and len(self._distinct) > 1:
                await JSONResponse(await self._models(request))(scope, receive, send)
            else:
                body = await request.body()
                fields = _fields(request, body)
                handle = self._find(request, fields)
                key = affinity(path, request.headers, fields)
                await while_connected(request, self._answer(handle, key, request, body, send))
        except (BackPressureError, DeploymentUnavailableError, TimeoutError, *LOST) as error:
            raise _as_api_error(error) from error
        except ClientDisconnect:
            pass  # before its request was whole

    async def _answer(self, handle: Handle, key: str, request: Request, body: bytes, send: Send) -> None:
        name = await _pass_on(handle, key, request, body, send)
        if name is not None:
            await _pass_on(self._deployments[name], key, request, body, send)

    def _find(self, request: Request, fields: Mapping[str, Any]) -> Handle:
        """Where the model of a request is; the first also says that there is none of a name."""
        name = fields.get("model") or request.query_params.get("model")
        name = request.scope["path"].removeprefix("/v1/models/") if "/v1/models/" in request.scope["path"] else name
        first = self._distinct[0]
        return self._deployments.get(name, first) if isinstance(name, str) else first

    async def _health(self) -> dict[str, Any]:
        """Of replicas that are healthy; an error where a model has none."""
        applications = (await asyncio.to_thread(serve.status)).applications
        count = 0
        for handle in self._distinct:
            deployment = applications[handle.app_name].deployments[handle.deployment_name]
            running = sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")
            if not running:
                raise DeploymentUnavailableError(handle.deployment_id)
            count += running
        return {"status": "ok", "replicas": count}

    async def _metrics(self) -> bytes:
        """Those of all replicas, each with the name of its own."""
        merged: dict[str, Metric] = {}
        asked = [handle.broadcast("metrics").results_async(timeout_s=PATIENCE) for handle in self._distinct]
        for name, metrics in itertools.chain(*await asyncio.gather(*asked)):
            for metric in metrics:
                into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                into.samples += [x._replace(labels=x.labels | {"replica": name}) for x in metric.samples]
        registry = CollectorRegistry()
        registry.register(_Ready(merged.values()))
        return generate_latest(registry)

    async def _models(self, request: Request) -> dict[str, Any]:
        """The lists of all models as one."""
        replies: list[dict[str, Any]] = []
        for handle in self._distinct:
            body = bytearray()
            async for messages in _call(handle, "", request, b""):
                for message in messages:
                    body += message.get("body", b"")
            replies.append(json.loads(body))
        return replies[0] | {"data": [model for reply in replies for model in reply["data"]]}


class _Ready(Collector):
    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _fields(request: Request, body: bytes) -> dict[str, Any]:
    """Those of a body in JSON; what is wrong with it the replica says."""
    if request.method != "POST":
        return {}
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _call(handle: Handle, key: str, request: Request, body: bytes) -> Any:
    scope = {name: request.scope[name] for name in SCOPE if name in request.scope}
    return handle.options(method_name="answer", stream=True, session_id=key).remote(scope, body)


async def _pass_on(handle: Handle, key: str, request: Request, body: bytes, send: Send) -> str | None:
    """Sends what a replica answers. One that is lost before it has said anything is asked again elsewhere, once; of one
    that is lost in the middle of a stream the last event tells. Returns a name where the model asked for is elsewhere,
    as only the replica could find out: a conversation keeps the name of its model."""
    for is_last in (False, True):
        response, begun = _call(handle, key, request, body), None
        try:
            async for messages in response:
                for message in messages:
                    if message["type"] == "http.response.start":
                        if message["status"] == MISDIRECTED:
                            return unquote(dict(message["headers"])[b"x-model"].decode())
                        begun = _Reply((b"content-type", b"text/event-stream") in _types(message["headers"]))
                    await send(message)
                    if message["type"] == "http.response.body" and not message.get("more_body", False):
                        return None  # at once: from here on it is no news that the client may go
        except LOST as error:
            log.warning("heronry: a replica was lost (%s)", type(error).__name__)
            if begun is None and not is_last:
                continue
            if begun is None or not begun.is_stream:
                raise
            shape = ERROR_SHAPES.get(request.scope["path"], openai_shape)
            last = event(shape(_as_api_error(error)))
            await send({"type": "http.response.body", "body": last.encode()})
            return None
        except asyncio.CancelledError:
            response.cancel()
            raise
    return None


def _types(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value.partition(b";")[0]) for name, value in headers if name == b"content-type"]


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, BackPressureError):
        return as_api_error(Busy("all replicas have as many requests as they take", 1))
    if isinstance(error, DeploymentUnavailableError):
        found = ApiError(503, "no replica is ready; try again")
    elif isinstance(error, TimeoutError):
        found = ApiError(503, "not all replicas have said how they are")
    else:
        found = ApiError(503, "the replica that answered this has ended; try again")
    found.headers["retry-after"] = "1"
    return found
