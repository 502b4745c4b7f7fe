"""What the routes of rwkv_lightning have in common: their bodies, errors and ids, and how its clients get in."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel, Field

from ..engine.presets import PRESETS
from ..models import State
from . import named_states
from .bodies import DialectBody
from .errors import ApiError
from .gate import find_owner
from .models import ServedModel
from .server import owner_of, server_of

USUAL = PRESETS["lightning"]
MOST_TOKENS = 8192  # of an answer where a body does not say it
ITS_MODEL = "rwkv7"  # what its clients call the one model of a server
STATE_HEADER = "x-rwkv-state-id"


def error_shape(error: ApiError) -> dict[str, Any]:
    return {"error": f"{error.param}: {error.message}" if error.param else error.message} | error.details


async def identify(request: Request) -> None:
    """The key may stand in the body, as a password."""
    if request.state.owner is not None:
        return
    try:
        body = await request.json()
    except ValueError:
        body = None
    password = body.get("password") if isinstance(body, dict) else None
    try:
        request.state.owner = find_owner(server_of(request).keys, password if isinstance(password, str) else "")
    except ApiError as error:
        raise ApiError(401, "Unauthorized: invalid or missing password", code=error.code) from error


class AdapterFields(BaseModel):
    """Which model is asked, with which of its adapters, from which state on."""

    model: str | None = None
    state_id: str | None = Field(None, description="a kept state, from which every text goes on")
    adapter_id: str | None = None
    adapter_version: str | None = None
    adapter_scale: float | None = Field(None, description="only 1 is served")


class ModelBody(AdapterFields, DialectBody):
    password: str | None = Field(None, description="in place of a key in the headers")


class BatchBody(ModelBody):
    max_tokens: int = Field(MOST_TOKENS, ge=0, le=1 << 30)
    temperature: float = Field(USUAL.temperature, ge=0, le=1e6)
    top_k: int = Field(USUAL.top_k, ge=-1, le=1 << 30, description="0 or -1: off")
    top_p: float = Field(USUAL.top_p, ge=0, le=1)
    alpha_presence: float = Field(USUAL.presence_penalty, ge=-1e6, le=1e6)
    alpha_frequency: float = Field(USUAL.frequency_penalty, ge=-1e6, le=1e6)
    alpha_decay: float = Field(USUAL.penalty_decay, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop_tokens: list[int | str] | None = Field(None, description="token ids and texts; none: the template's texts")
    stream: bool = False
    chunk_size: int = Field(8, ge=1, description="tokens of an event")


class CompletionsBody(BatchBody):
    contents: list[str]


def find_model(request: Request, body: AdapterFields) -> ServedModel:
    """The model that a body names, with its adapter."""
    server = server_of(request)
    models = server.models
    model = models.find(None if body.model == ITS_MODEL and ITS_MODEL not in models.by_name else body.model)
    if body.adapter_scale not in (None, 1):
        raise ApiError(400, "only a scale of 1 is served: that of the adapter's file", "adapter_scale")
    if body.adapter_id is None:
        if body.adapter_version is not None:
            raise ApiError(400, "give an adapter_id with it", "adapter_version")
        return model
    return server.adapters.find(model, body.adapter_id, body.adapter_version)


def choose_id(name: str, *given: str | None) -> str | None:
    """The one id that a request names, perhaps in several places; ApiError where they differ."""
    found = {text for text in given if text}
    if len(found) > 1:
        raise ApiError(400, "two different ids in one request", name)
    return found.pop() if found else None


async def uploaded_state(request: Request, model: ServedModel, body: AdapterFields) -> State | None:
    """The state that a body or the headers name."""
    name = choose_id("state_id", body.state_id, request.headers.get(STATE_HEADER))
    begin = await named_states.begin_from(server_of(request), model, owner_of(request), name)
    return begin and begin.state
