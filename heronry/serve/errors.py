"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} with a true status; on the
routes of other dialects in their shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from ..engine.requests import Busy
from ..errors import InputError

log = logging.getLogger("heronry.serve")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """What a client is told in place of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}
        self.details: dict[str, Any] = {}  # more fields, for a dialect that has them

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


Shape = Callable[[ApiError], dict[str, Any]]  # the body that tells a client of a dialect of an error


def openai_shape(error: ApiError) -> dict[str, Any]:
    return error.body


def shape_for(request: Request, shapes: Mapping[str, Shape] | None = None) -> Shape:
    """How a client is told of an error: as its body asks for, which a route has noted in `request.state.error_shape`,
    or as its path does."""
    route = request.scope.get("route")
    path = route.path if isinstance(route, Route) else request.scope["path"]  # with the names of its variables
    usual: Shape = (shapes or {}).get(path, openai_shape)
    found: Shape = getattr(request.state, "error_shape", usual)
    return found


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error), getattr(error, "param", None))
    if isinstance(error, Busy):
        found = ApiError(429, str(error), code="too_many_requests")
        found.headers["retry-after"] = str(round(error.retry_after))
        return found
    if isinstance(error, MemoryError):
        return ApiError(503, "there is not enough memory for this request")
    log.error("an error of the server itself", exc_info=error)
    return ApiError(500, "the server has failed; its log says why")


def add_error_handlers(app: FastAPI, shapes: Mapping[str, Shape]) -> None:
    """Gives every error its shape, those of the framework too. shapes: of the paths that have one of their own."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        found, shape = as_api_error(error), shape_for(request, shapes)
        return JSONResponse(shape(found), found.status, found.headers)

    async def known(request: Request, error: Exception) -> JSONResponse:
        return respond(request, error)

    async def wrong_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first: Mapping[str, Any] = error.errors()[0]
        if first["type"] == "json_invalid":
            return respond(request, ApiError(400, f"the body is not JSON: {first['ctx']['error']}"))
        if first["loc"] == ("body",) and first["type"] != "value_error":
            return respond(request, ApiError(400, "the body must be a JSON object, sent as application/json"))
        return respond(request, ApiError(400, first["msg"].removeprefix("Value error, "), _place(first["loc"])))

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # while the body was read
            return respond(request, error.__cause__)
        message = {404: "there is no such route", 405: "this route does not take that method"}.get(error.status_code)
        found = ApiError(error.status_code, message or str(error.detail or HTTPStatus(error.status_code).phrase))
        found.headers |= dict(error.headers or {})
        return respond(request, found)

    app.add_exception_handler(RequestValidationError, wrong_body)
    app.add_exception_handler(HTTPException, of_http)
    for kind in (ApiError, InputError, Busy, Exception):
        app.add_exception_handler(kind, known)


def _place(parts: Sequence[Any]) -> str | None:
    """Where in a body, as OpenAI names it: messages.[0].content."""
    names = [f"[{part}]" if isinstance(part, int) else str(part) for part in parts if part != "body"]
    return ".".join(names) or None
