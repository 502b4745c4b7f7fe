"""What every request passes on its way in: the host it names, its key, its size; and what every reply carries."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

log = logging.getLogger("heronry.serve")
OPEN_ROUTES = ("/health", "/v1/health", "/ping")  # for load balancers, which have no key
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Middleware around the whole app.

    Args:
        keys: API key -> the name of its owner; empty: no key is asked for.
        hosts: names under which the server may be called, or "*" for any: a web page that points its own name at this
            machine (DNS rebinding) is refused.
        max_body: bytes.
    """

    def __init__(self, app: ASGIApp, keys: Mapping[str, str], hosts: Collection[str], max_body: int):
        self.app, self.keys, self.hosts, self.max_body = app, dict(keys), hosts, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, begin = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,128}", given) else f"req_{secrets.token_hex(12)}"
        status, size = 0, 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reply = MutableHeaders(scope=message)
                reply["x-request-id"] = request_id
                reply["openai-processing-ms"] = str(round(1000 * (time.perf_counter() - begin)))
                reply["x-content-type-options"] = "nosniff"
            await send(message)

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise _too_large(self.max_body)
            return message

        try:
            scope.setdefault("state", {})["owner"] = self._check(scope["path"], headers)
            await self.app(scope, bounded, answer)
        except ApiError as error:
            if status:
                raise
            await _send(error, answer)
        finally:
            line = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            log.info(json.dumps(line | {"ms": round(1000 * (time.perf_counter() - begin), 1)}))

    def _check(self, path: str, headers: Headers) -> str:
        """The owner of a request's key; ApiError if it may not come in."""
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if "*" not in self.hosts and host.lower() not in self.hosts:
            raise ApiError(403, f"this server is not called {host!r}; start it with --allow-host to add a name")
        if int(length if (length := headers.get("content-length", "0")).isdigit() else 0) > self.max_body:
            raise _too_large(self.max_body)
        if not self.keys or path in OPEN_ROUTES:
            return ""
        given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        owners = [owner for key, owner in self.keys.items() if hmac.compare_digest(key.encode(), given.encode())]
        if not owners:
            what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key")
        return owners[0]


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes")


async def _send(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
