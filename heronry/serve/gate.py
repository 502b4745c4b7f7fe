"""What every request passes on its way in: the host it names, its key, its size; and what every reply carries."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import page
from .errors import ApiError, Shape, openai_shape
from .stream import event

log = logging.getLogger("heronry.serve")
# for load balancers, which have no key; where Ai00's clients send theirs; and the chat page, which asks for one
OPEN_ROUTES = ("/health", "/v1/health", "/ping", "/api/auth/exchange", *page.FILES)
PAUSE = 30  # seconds in which something more of a body must come
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Middleware around the whole app.

    Args:
        keys: API key -> the name of its owner; empty: no key is asked for.
        hosts: names under which the server may be called, or "*" for any: a web page that points its own name at this
            machine (DNS rebinding) is refused.
        max_body: bytes.
        time_limit: seconds that a request may take, its stream included.
        shapes: of the errors of the paths that have one of their own.
        keys_in_bodies: paths where a request without a key in its headers comes in without an owner: the route itself
            looks for it in the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Mapping[str, str],
        hosts: Collection[str],
        max_body: int,
        time_limit: float,
        shapes: Mapping[str, Shape],
        keys_in_bodies: Collection[str],
    ):
        self.app, self.keys, self.hosts, self.max_body, self.time_limit = app, keys, hosts, max_body, time_limit
        self.shapes, self.keys_in_bodies = shapes, keys_in_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, begin = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,128}", given) else f"req_{secrets.token_hex(12)}"
        status, size, is_whole, is_stream = 0, 0, False, False

        async def answer(message: Message) -> None:
            nonlocal status, is_stream
            if message["type"] == "http.response.start":
                status = message["status"]
                reply = MutableHeaders(scope=message)
                is_stream = reply.get("content-type", "").startswith("text/event-stream")
                reply["x-request-id"] = request_id
                reply["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - begin)))
                reply["x-content-type-options"] = "nosniff"
            await send(message)

        async def bounded() -> Message:
            nonlocal size, is_whole
            try:
                message = await (receive() if is_whole else asyncio.wait_for(receive(), PAUSE))
            except asyncio.TimeoutError:
                raise ApiError(408, f"nothing more of the body has come for {PAUSE} s") from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self.max_body:
                raise _too_large(self.max_body)
            return message

        try:
            scope.setdefault("state", {})["owner"] = self._check(scope["path"], headers)
            await asyncio.wait_for(self.app(scope, bounded, answer), self.time_limit)
        except (ApiError, asyncio.TimeoutError) as error:
            if not isinstance(error, ApiError):
                error = ApiError(504, f"the request has taken longer than {self.time_limit:g} s")
                error.headers["x-should-retry"] = "false"
            shape = self.shapes.get(scope["path"], openai_shape)
            if not status:
                await _send(error, shape, answer)
            elif is_stream:
                await answer({"type": "http.response.body", "body": event(shape(error)).encode()})
            else:
                raise
        except asyncio.CancelledError:
            pass  # the client has gone, and with it whoever would read an answer
        finally:
            line = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(line | {"ms": round(1000 * (time.perf_counter() - begin), 1)}))

    def _check(self, path: str, headers: Headers) -> str | None:
        """The owner of a request's key; None where the body will say it; ApiError if it may not come in."""
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if "*" not in self.hosts and host.lower() not in self.hosts:
            raise ApiError(403, f"this server is not called {host!r}; start it with --allow-host to add a name")
        if int(length if (length := headers.get("content-length", "0")).isdigit() else 0) > self.max_body:
            raise _too_large(self.max_body)
        if not self.keys or path in OPEN_ROUTES:
            return ""
        given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        if not given and path in self.keys_in_bodies:
            return None
        return find_owner(self.keys, given)


def find_owner(keys: Mapping[str, str], given: str) -> str:
    """The owner of an API key; ApiError if it is none. Takes as long for a wrong key as for a right one."""
    attempt = given.encode(errors="surrogatepass")  # a body may hold what is no text
    owners = [owner for key, owner in keys.items() if hmac.compare_digest(key.encode(), attempt)]
    if not owners:
        what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, what, code="invalid_api_key")
    return owners[0]


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes")


async def _send(error: ApiError, shape: Shape, send: Send) -> None:
    body = json.dumps(shape(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
