"""rwkv_lightning's sessions: a client gives a name, and every text goes on from where the last one of that name ended.
Those of /multi_state are trees: every turn has a number, from which any number of others go on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Any, NamedTuple

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..models import State
from ..stores.memory import MemoryStore
from ..stores.store import Entry, Key
from . import named_states
from .bodies import DialectBody
from .errors import ApiError
from .lightning_batch import Batch, text_stops
from .lightning_bodies import CompletionsBody, choose_id, find_model, identify, uploaded_state
from .models import ServedModel
from .reading import read_ending, read_tokens
from .server import Server, owner_of, server_of

router = APIRouter(dependencies=[Depends(identify)])
KIND = "session"  # the states of sessions and of their turns
NUMBERS = "dialogue"  # the last turn of a tree
SEPARATOR = "\n\n"  # between an answer and the next turn
SESSION_HEADER = "x-rwkv-session-id"
MOST_LISTED = 1 << 20


class SessionBody(CompletionsBody):
    session_id: str | None = Field(None, max_length=1024, description=f"or the header {SESSION_HEADER}")
    contents: list[str] = Field(description="one: what is new")


class TurnBody(SessionBody):
    dialogue_idx: int = Field(0, ge=0, le=1 << 53, description="the turn to go on from; 0: the beginning")


class StatusBody(DialectBody):
    password: str | None = None


class DeleteBody(StatusBody):
    session_id: str | None = None
    delete_prefix: bool = Field(False, description="its turns as well")


class _Known(NamedTuple):
    """Where a session is. text: all of it; None = it began from an uploaded state, so it cannot be read again."""

    state: State
    text: str | None


@router.post("/state/chat/completions")
async def continue_session(body: SessionBody, request: Request) -> Response:
    """Goes on with a session, or begins one."""
    session = _session(request, body.session_id)
    model = find_model(request, body)
    batch = await _continue(body, request, model, session, session)
    return await batch.reply("rwkv7-fast-state")


@router.post("/multi_state/chat/completions")
async def continue_turn(body: TurnBody, request: Request) -> Response:
    """Goes on from any turn of a session: a new turn, which has a number of its own."""
    session, number = _session(request, body.session_id), body.dialogue_idx
    server, owner, model = server_of(request), owner_of(request), find_model(request, body)
    begin = f"{session}:{number}"
    if number and await _find(server, model, owner, begin) is None:
        raise ApiError(404, f"session {session!r} has no turn {number}", "dialogue_idx")
    _one_content(body)
    new = await _next_number(server, owner, session)
    batch = await _continue(body, request, model, begin, f"{session}:{new}")
    batch.head = {"dialogue_idx": new}
    batch.first = {"object": "multi_state.dialogue_idx", "session_id": f"{session}:{new}", "dialogue_idx": new}
    return await batch.reply("rwkv7-multi-state")


@router.post("/state/status")
async def list_sessions(body: StatusBody, request: Request) -> dict[str, Any]:
    """The sessions of a key's owner, and their turns."""
    server = server_of(request)
    entries = await _entries(server, owner_of(request))
    in_ram = isinstance(server.kept.store, MemoryStore)
    level = "L2 (RAM)" if in_ram else "Database (Disk)"
    sessions = [
        {
            "session_id": entry.about["session_id"],
            "cache_level": level,
            "last_updated": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created)),
            "timestamp": entry.created,
        }
        for entry in entries
    ]
    return {
        "status": "success",
        "l1_cache_count": 0,
        "l2_cache_count": len(entries) if in_ram else 0,
        "database_count": 0 if in_ram else len(entries),
        "total_sessions": len(entries),
        "sessions": sessions,
    }


@router.post("/state/delete")
async def delete_session(body: DeleteBody, request: Request) -> Response:
    """Forgets a session, under every model."""
    session, server, owner = _session(request, body.session_id), server_of(request), owner_of(request)
    entries = await _entries(server, owner)
    names = [entry.about["session_id"] for entry in entries]
    wanted = [name == session or (body.delete_prefix and name.startswith(f"{session}:")) for name in names]
    keys = [entry.key for entry, is_wanted in zip(entries, wanted, strict=True) if is_wanted]
    if body.delete_prefix:
        keys.append(Key(NUMBERS, owner, _digest(session)))
    for key in keys:
        if not await asyncio.to_thread(server.kept.store.delete, key) and await _is_there(server, key):
            raise ApiError(503, "the store of states cannot be written now; try again")
    if not keys:
        missing = {"status": "not_found", "message": f"Session {session} not found"}
        return JSONResponse(missing, 404)
    return JSONResponse({"status": "success", "message": f"Session {session} deleted"})


def _session(request: Request, given: str | None) -> str:
    """The session that a request is about."""
    session = choose_id("session_id", given, request.headers.get(SESSION_HEADER))
    if session is None:
        raise ApiError(400, "Missing session_id")
    return session


def _one_content(body: SessionBody) -> str:
    if len(body.contents) != 1:
        raise ApiError(400, f"a session takes exactly one text, got {len(body.contents)}", "contents")
    return body.contents[0]


def _digest(*parts: str) -> str:
    """The name of an entry: whatever a client calls a session, it is never a part of it."""
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()


def _key(model: ServedModel, owner: str, session: str) -> Key:
    """Of the state of a session, which is another one for every model, precision, adapter and initial state."""
    return Key(KIND, owner, _digest(model.identity, session))


async def _entries(server: Server, owner: str) -> list[Entry]:
    entries = await asyncio.to_thread(server.kept.store.entries, KIND, owner, MOST_LISTED)
    if not server.kept.store.is_readable:
        raise ApiError(503, "the store of states cannot be read now; try again")
    return entries


async def _is_there(server: Server, key: Key) -> bool:
    return await asyncio.to_thread(lambda: server.kept.store.get(key, with_data=False)) is not None


async def _find(server: Server, model: ServedModel, owner: str, session: str) -> _Known | None:
    """Where a session is; None for a new one. A state that is gone is read again from its text."""
    kept = await asyncio.to_thread(server.kept.get, _key(model, owner, session))
    if kept is None:
        if not server.kept.store.is_readable:
            raise ApiError(503, "the store of states cannot be read now; try again")
        return None
    text = kept.entry.about["text"]
    if kept.state is not None:
        return _Known(kept.state, text)
    if text is None:
        what = (
            f"the state of session {session!r} is gone, and so is the one that it began from; delete it to begin again"
        )
        raise ApiError(410, what)
    ids = model.speaker.encode(text, begins=False)
    return _Known((await read_tokens(server, model, ids, None, owner)).with_texts([text]), text)


async def _continue(body: SessionBody, request: Request, model: ServedModel, begin: str, end: str) -> Batch:
    """What goes on from one session, or an uploaded state, and is kept as another before its client hears the end."""
    server, owner, text = server_of(request), owner_of(request), _one_content(body)
    state = await uploaded_state(request, model, body)
    known = None if state is not None else await _find(server, model, owner, begin)
    can_be_read_again = state is None and (known is None or known.text is not None)
    if known is not None:
        state = known.state
        text = text if text.startswith(SEPARATOR) else SEPARATOR + text
    batch = Batch(model, [text], text_stops(model, body), body, request, state, keep=True)

    async def keep() -> None:
        ending = batch.states[0].ending
        assert ending is not None
        after, _ = await read_ending(server, model, ending, owner)
        about = {"session_id": end, "model": model.name, "text": after.texts[0] if can_be_read_again else None}
        if not await asyncio.to_thread(server.kept.put, _key(model, owner, end), after, about):
            raise named_states.cannot_keep()

    batch.before_end = keep
    return batch


async def _next_number(server: Server, owner: str, session: str) -> int:
    """Of a new turn, from 1 on: each is given out once, whatever becomes of it."""
    key, store = Key(NUMBERS, owner, _digest(session)), server.kept.store
    async with server.numbering:
        entry = await asyncio.to_thread(lambda: store.get(key, with_data=False))
        number = 1 if entry is None else entry.about["last"] + 1
        if not await asyncio.to_thread(store.put, key, b"\0", {"last": number}):
            raise named_states.cannot_keep()
    return int(number)
