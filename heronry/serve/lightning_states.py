"""rwkv_lightning's uploaded states, which are states with names as those of /v1/states."""

from __future__ import annotations

import asyncio
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from . import named_states
from .bodies import DialectBody
from .errors import ApiError
from .lightning_bodies import STATE_HEADER, choose_id, identify
from .server import Server, owner_of, server_of
from .state_uploads import read_upload

router = APIRouter(dependencies=[Depends(identify)])
UPLOAD_HEADER = "x-rwkv-state-upload-uuid"  # of its router, which gives a state the same id on many servers


class DeleteBody(DialectBody):
    state_id: str | None = None


@router.post("/v1/state/upload")
async def upload_state(request: Request) -> dict[str, Any]:
    """Keeps the tuned state in the field "file" of a multipart form, under the name of the file."""
    server, owner = server_of(request), owner_of(request)
    async with request.form(max_files=1, max_fields=16) as form:
        file, name = form.get("file"), form.get("model")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "a multipart form with a file is expected", "file")
        data, filename = await file.read(), file.filename or ""
    model = server.models.find(name if isinstance(name, str) else None)
    if (given := request.headers.get(UPLOAD_HEADER)) is not None:
        filename = f"{PurePath(filename).stem}-{given}" if PurePath(filename).name == filename else filename
    key = named_states.key_of(owner, filename)
    entry = await asyncio.to_thread(lambda: server.kept.store.get(key, with_data=False))
    if entry is not None and entry.size:
        raise ApiError(400, f"State {filename} already exists")
    state = await asyncio.to_thread(read_upload, data, model.speaker.model)
    return _describe(server, await named_states.keep(server, key, state, model, None, "upload"))


@router.get("/v1/state/list")
@router.post("/v1/state/list")
async def list_states(request: Request) -> dict[str, Any]:
    """All states with names of a key's owner."""
    server = server_of(request)
    entries = await asyncio.to_thread(server.kept.store.entries, named_states.KIND, owner_of(request))
    return {"object": "list", "data": [_describe(server, named_states.describe(x)) for x in entries if x.size]}


@router.delete("/v1/state/delete")
@router.post("/v1/state/delete")
async def delete_state(request: Request, body: DeleteBody | None = None, state_id: str | None = None) -> Response:
    name = choose_id("state_id", body.state_id if body else None, request.headers.get(STATE_HEADER), state_id)
    if name is None:
        raise ApiError(400, "Missing state_id")
    server, owner = server_of(request), owner_of(request)
    if await asyncio.to_thread(server.kept.store.delete, named_states.key_of(owner, name)):
        return JSONResponse({"state_id": name, "deleted": True})
    try:
        await named_states.find(server, owner, name)
    except ApiError as error:
        error.details |= {"state_id": name, "deleted": False}
        raise
    raise ApiError(503, "the store of states cannot be written now; try again")


def _describe(server: Server, about: dict[str, Any]) -> dict[str, Any]:
    model = server.models.by_name.get(about["model"])
    return {
        "object": "rwkv.state",
        "state_id": about["id"],
        "filename": about["id"],
        "size_bytes": about["bytes"],
        "tensor_count": len(model.speaker.model.time_states()) if model is not None else None,
        "created": about["created_at"],
    }
