"""/v1/states: states by name. Any of them is the beginning of any number of texts: see `state` of /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from . import named_states
from .errors import ApiError
from .named_states import InlineState, describe, key_of
from .reading import read_tokens
from .server import owner_of, server_of
from .state_uploads import read_upload

router = APIRouter(prefix="/v1/states")


class NewState(BaseModel):
    """text or tokens: what is read, from nothing or from another state.

    name: of the state; a new one where none is given.
    add_special_tokens: begin with the tokens that the model's texts begin with.
    return_state: in the reply, and nothing is kept.
    """

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    text: str | None = None
    tokens: list[int] | None = None
    state: str | InlineState | None = None
    name: str | None = None
    add_special_tokens: bool = True
    return_state: bool = False


class Fork(BaseModel):
    name: str | None = None


@router.post("")
async def create_state(body: NewState, request: Request) -> Response:
    """The state after a text."""
    server, owner = server_of(request), owner_of(request)
    model = server.models.find(body.model)
    given = body.text if body.tokens is None else body.tokens
    if given is None or (body.text is not None and body.tokens is not None):
        raise ApiError(400, "give a text or tokens", "text")
    if body.return_state and body.name is not None:
        raise ApiError(400, "with return_state nothing is kept; leave the name out", "name")
    key = key_of(owner, body.name)
    begin = await named_states.begin_from(server, model, owner, body.state)
    ids = model.speaker.encode(given, begins=begin is None and body.add_special_tokens)
    state = await read_tokens(server, model, ids, begin and begin.state, owner)
    state = state.with_texts([(begin.state.texts[0] if begin else "") + model.speaker.text_of(given)])
    if body.return_state:
        return JSONResponse(await asyncio.to_thread(named_states.inline, state, model))
    known = 0 if begin is None else begin.n_tokens
    n_tokens = None if known is None else known + len(ids)
    return JSONResponse(await named_states.keep(server, key, state, model, n_tokens, "text"), 201)


@router.get("")
async def list_states(request: Request) -> dict[str, Any]:
    """Those used last, the latest first."""
    store, owner = server_of(request).kept.store, owner_of(request)
    entries = await asyncio.to_thread(store.entries, named_states.KIND, owner)
    return {"object": "list", "data": [describe(entry) for entry in entries if entry.size]}


@router.get("/{name}")
async def show_state(name: str, request: Request) -> dict[str, Any]:
    """What is known of a state, with all of its text."""
    entry, state = await named_states.find(server_of(request), owner_of(request), name)
    return describe(entry) | {"text": state.texts[0]}


@router.put("/{name}")
async def upload_state(name: str, request: Request, model: str | None = None) -> Response:
    """Keeps the file in the body: one that was downloaded, or a tuned initial state."""
    server, owner = server_of(request), owner_of(request)
    served, key = server.models.find(model), key_of(owner, name)
    state = await asyncio.to_thread(read_upload, await request.body(), served.speaker.model)
    return JSONResponse(await named_states.keep(server, key, state, served, None, "upload"), 201)


@router.get("/{name}/content")
async def download_state(name: str, request: Request) -> Response:
    """The state as a file of `State.save`."""
    _, state = await named_states.find(server_of(request), owner_of(request), name)
    headers = {"content-disposition": f'attachment; filename="{name}.safetensors"'}
    return Response(await asyncio.to_thread(state.to_bytes), 200, headers, "application/octet-stream")


@router.post("/{name}/fork")
async def fork_state(name: str, body: Fork, request: Request) -> Response:
    """The same state under another name: whatever becomes of the one, the other stays."""
    server, owner = server_of(request), owner_of(request)
    key = key_of(owner, body.name)
    entry, state = await named_states.find(server, owner, name)
    about = {**entry.about, "source": "fork"}
    if not await asyncio.to_thread(server.kept.put, key, state, about):
        raise named_states.cannot_keep()
    forked, _ = await named_states.find(server, owner, key.name)
    return JSONResponse(describe(forked), 201)


@router.delete("/{name}")
async def delete_state(name: str, request: Request) -> dict[str, Any]:
    server, owner = server_of(request), owner_of(request)
    if not await asyncio.to_thread(server.kept.store.delete, key_of(owner, name)):
        await named_states.find(server, owner, name)  # which says what is wrong
        raise ApiError(503, "the store of states cannot be written now; try again")
    return {"id": name, "object": "state", "deleted": True}
