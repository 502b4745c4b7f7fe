"""The slots of llama.cpp's server: the state after the latest completion that named one, saved and restored by name.

What a slot has read cannot be taken back, as there: the next completion in it goes on from its state where the prompt
begins with its whole text, and else reads all of the prompt.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request

from ..models import State
from ..stores.store import Key
from . import named_states
from .bodies import DialectBody
from .errors import ApiError
from .models import ServedModel
from .server import Server, owner_of, server_of

router = APIRouter()
KIND = "slot"
Action = Literal["save", "restore", "erase"]


class SlotFile(DialectBody):
    model: str | None = None
    filename: str | None = None


class Slot(NamedTuple):
    """n_tokens: that the state has read."""

    state: State
    n_tokens: int


def check_number(server: Server, number: int, param: str | None = None) -> None:
    """ApiError for a slot that there is not."""
    rows = server.scheduler.limits.rows
    if not 0 <= number < rows:
        raise ApiError(400, f"there is no slot {number}; there are 0 to {rows - 1}", param)


async def find_slot(server: Server, model: ServedModel, owner: str, number: int) -> Slot | None:
    """What a slot holds of this model; None = nothing."""
    kept = await asyncio.to_thread(server.kept.get, _key(owner, number))
    if kept is None or kept.state is None or kept.entry.about["model"] != model.name:
        return None
    if kept.state.fingerprint != model.speaker.model.fingerprint:
        return None
    return Slot(kept.state, kept.entry.about["tokens"])


async def keep_slot(server: Server, model: ServedModel, owner: str, number: int, slot: Slot) -> None:
    """Puts a state in a slot, in place of what it held; ApiError where it cannot be kept."""
    about = {"model": model.name, "tokens": slot.n_tokens}
    if not await asyncio.to_thread(server.kept.put, _key(owner, number), slot.state, about):
        raise named_states.cannot_keep()


def _key(owner: str, number: int) -> Key:
    return Key(KIND, owner, str(number))


@router.post("/slots/{number}")
async def change_slot(number: int, action: Action, request: Request, body: SlotFile | None = None) -> dict[str, Any]:
    """Saves a slot as a state by name, restores it from one, or empties it."""
    server, owner, begin = server_of(request), owner_of(request), time.perf_counter()
    check_number(server, number)
    if action == "erase":
        kept = await asyncio.to_thread(server.kept.get, _key(owner, number))
        await asyncio.to_thread(server.kept.store.delete, _key(owner, number))
        return {"id_slot": number, "n_erased": kept.entry.about["tokens"] if kept else 0}
    if body is None or body.filename is None:
        raise ApiError(400, f"{action} needs the name of a state", "filename")
    model = server.models.find(body.model)
    key, found = named_states.key_of(owner, body.filename), {"id_slot": number, "filename": body.filename}
    if action == "save":
        slot = await find_slot(server, model, owner, number)
        if slot is None:
            raise ApiError(400, f"slot {number} is empty: no completion of {model.name!r} has named it in id_slot")
        saved = await named_states.keep(server, key, slot.state, model, slot.n_tokens, KIND)
        counts = {"n_saved": slot.n_tokens, "n_written": saved["bytes"]}
    else:
        entry, state = await named_states.find(server, owner, body.filename)
        if state.fingerprint != model.speaker.model.fingerprint:
            raise ApiError(400, f"the state {body.filename!r} belongs to another model than {model.name!r}", "filename")
        n_tokens = entry.about["tokens"] or 0  # of an upload nobody knows it
        await keep_slot(server, model, owner, number, Slot(state, n_tokens))
        counts = {"n_restored": n_tokens, "n_read": entry.size}
    return found | counts | {"timings": {f"{action}_ms": 1000 * (time.perf_counter() - begin)}}
