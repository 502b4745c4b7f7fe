"""What RWKV-Runner's clients ask for: its status, and OpenAI's routes without /v1."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from . import basics, completions, llama_cpp
from .errors import ApiError
from .server import server_of

Body = TypeVar("Body", bound=BaseModel)
router = APIRouter()
router.add_api_route("/models", basics.list_models)


@router.get("/status")
async def status(request: Request) -> dict[str, Any]:
    server = server_of(request)
    device = server.models.find(None).speaker.device
    state = "Working" if server.scheduler.is_alive() else "Offline"
    return {"status": state, "pid": os.getpid(), "device_name": str(device).upper()}


@router.post("/switch-model")
@router.post("/update-config")
@router.post("/exit")
@router.post("/disable-state-cache")
@router.post("/reset-state-cache")
async def change_for_everybody() -> None:
    raise ApiError(403, "this would change the server for everybody; start heronry serve with other options instead")


@router.post("/enable-state-cache")
async def enable_state_cache() -> str:
    """It always is."""
    return "success"


@router.post("/completions")
async def create_completion(body: dict[str, Any], request: Request) -> Response:
    """As /v1/completions; as /completion where n_predict says that llama.cpp's route of this name is meant."""
    if "n_predict" in body:
        return await llama_cpp.complete(await _parse(llama_cpp.CompletionBody, request), request)
    return await completions.create_completion(await _parse(completions.CompletionBody, request), request)


async def _parse(kind: type[Body], request: Request) -> Body:
    try:
        return kind.model_validate_json(await request.body())  # which, unlike the dict, must be text throughout
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
