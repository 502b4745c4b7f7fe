"""States that clients name: kept, found again and told of, for the routes that take or give one."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from ..engine.kept_states import new_name
from ..models import State
from ..stores.store import Entry, Key
from .errors import ApiError
from .models import ServedModel
from .server import Server
from .state_uploads import read_inline

KIND = "state"
SHOWN = 200  # characters of a text's end, in lists


class InlineState(BaseModel):
    """A state in the body itself: base64 of a file."""

    model_config = ConfigDict(hide_input_in_errors=True)

    data: str


class Begin(NamedTuple):
    """n_tokens: that the state has read; None = nobody knows."""

    state: State
    n_tokens: int | None


def key_of(owner: str, name: str | None) -> Key:
    """InputError for what is no name. None = a new one that nobody guesses."""
    return Key(KIND, owner, new_name(KIND) if name is None else name)


async def find(server: Server, owner: str, name: str) -> tuple[Entry, State]:
    """ApiError where there is none."""
    kept = await asyncio.to_thread(server.kept.get, key_of(owner, name))
    if kept is not None and kept.state is not None:
        return kept.entry, kept.state
    if not server.kept.store.is_readable:
        raise ApiError(503, "the store of states cannot be read now; try again")
    raise ApiError(404, f"there is no state {name!r}", "state", "state_not_found")


async def begin_from(server: Server, model: ServedModel, owner: str, given: str | InlineState | None) -> Begin | None:
    """What a request goes on from: a state by its name, or in the body. ApiError or InputError for one that there is
    not, or that is none of this model."""
    if given is None:
        return None
    if isinstance(given, InlineState):
        return Begin(await asyncio.to_thread(read_inline, given.data, model.speaker.model), None)
    entry, state = await find(server, owner, given)
    if state.fingerprint != model.speaker.model.fingerprint:
        what = f"the state {given!r} belongs to another model, {entry.about['model']!r}, than {model.name!r}"
        raise ApiError(400, what, "state")
    return Begin(state, entry.about["tokens"])


async def keep(
    server: Server, key: Key, state: State, model: ServedModel, n_tokens: int | None, source: str
) -> dict[str, Any]:
    """Keeps a state, in place of one of that name; ApiError where it cannot be kept. Returns what is known of it."""
    about = {"model": model.name, "tokens": n_tokens, "source": source, "text_end": state.texts[0][-SHOWN:]}
    if not await asyncio.to_thread(server.kept.put, key, state, about):
        raise cannot_keep()
    entry = await asyncio.to_thread(lambda: server.kept.store.get(key, with_data=False))
    if entry is None:
        raise cannot_keep()
    return describe(entry)


def cannot_keep() -> ApiError:
    error = ApiError(507, "the state cannot be kept: it is larger than the store, or that cannot be written now")
    error.headers["x-should-retry"] = "false"
    return error


def describe(entry: Entry) -> dict[str, Any]:
    """A kept state as clients see it."""
    about: Mapping[str, Any] = entry.about
    head = {"id": entry.key.name, "object": "state", "created_at": int(entry.created), "bytes": entry.size}
    return head | {"sha256": entry.digest} | dict(about)


def inline(state: State, model: ServedModel) -> dict[str, Any]:
    """A state in the reply itself; its data can be given as a state again."""
    data = base64.b64encode(state.to_bytes()).decode()
    return {"object": "state", "model": model.name, "data": data}
