"""Responses that are kept: their items, and the state after the answer, from which the next turn goes on.

The items outlive the state: where it is gone, or was read under other instructions, they are read again.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, fields
from typing import Any

from ..engine.kept_states import Kept
from ..errors import InputError
from ..models import State
from ..stores.store import Key
from .errors import ApiError
from .response_items import Item
from .server import Server

KIND = "response"


class ResponseNotFound(ApiError):
    """type: as OpenAI has it for responses."""

    type = "invalid_request_error"


@dataclass(frozen=True)
class KeptResponse:
    """
    response: as it was answered.
    items: all that came before its answer. continues: which goes on with the last of them.
    front: what stood in front of them; see `ResponsePrompt`.
    state: after the answer; None = it is gone. n_tokens: that it has read; owed: what it has not read of the answer,
        and what separates that from the next turn.
    """

    response: dict[str, Any]
    items: list[Item]
    continues: bool
    front: str
    n_tokens: int
    owed: str
    state: State | None

    @property
    def all_items(self) -> list[Item]:
        """With those of the answer; one that it goes on with is whole."""
        items, output = list(self.items), list(self.response["output"])
        if self.continues and output and output[0]["type"] == "message":
            begun, rest = items.pop(), output.pop(0)
            items.append(begun | {"content": [*begun["content"], *rest["content"]]})
        return items + output


def _key(owner: str, name: str) -> Key | None:
    try:
        return Key(KIND, owner, name)
    except InputError:
        return None


async def find(server: Server, owner: str, name: str) -> KeptResponse | None:
    """None where there is none; ApiError while that cannot be known."""
    key = _key(owner, name)
    kept: Kept | None = None
    if key is not None:
        kept = await asyncio.to_thread(server.kept.get, key)
        if kept is None and not server.kept.store.is_readable:
            raise ApiError(503, "the store of responses cannot be read now; try again")
    if kept is None:
        return None
    return KeptResponse(**kept.entry.about, state=kept.state)


async def get(server: Server, owner: str, name: str) -> KeptResponse:
    """ApiError where there is none."""
    found = await find(server, owner, name)
    if found is None:
        raise ResponseNotFound(404, f"Response with id '{name}' not found.")
    return found


async def get_previous(server: Server, owner: str, name: str) -> KeptResponse:
    """The one that another follows; ApiError where there is none."""
    found = await find(server, owner, name)
    if found is None:
        what = f"Previous response with id '{name}' not found."
        raise ResponseNotFound(404, what, "previous_response_id", "previous_response_not_found")
    return found


async def resolve(server: Server, owner: str, item: Any) -> Any:
    """An item of an input; in place of a reference, the item of an earlier response that it names."""
    if not isinstance(item, dict) or item.get("type") != "item_reference":
        return item
    name = item.get("id")
    of = re.fullmatch(r"[a-z]+_([0-9a-f]{32})_\d+", name) if isinstance(name, str) else None
    response = await find(server, owner, f"resp_{of[1]}") if of else None
    output = [] if response is None else response.response["output"]
    found = next((x for x in output if x["id"] == name), None)
    if found is None:
        raise ResponseNotFound(404, f"Item with id {name!r} not found.", "input")
    return found


async def keep(server: Server, owner: str, kept: KeptResponse) -> bool:
    """Whether it is kept now, and outlives the server if its store does."""
    assert kept.state is not None
    about = {field.name: getattr(kept, field.name) for field in fields(kept) if field.name != "state"}
    return await asyncio.to_thread(server.kept.put, Key(KIND, owner, kept.response["id"]), kept.state, about)


async def delete(server: Server, owner: str, name: str) -> None:
    """ApiError where there is none."""
    key = _key(owner, name)
    if key is None or not await asyncio.to_thread(server.kept.store.delete, key):
        await get(server, owner, name)  # which says what is wrong
        raise ApiError(503, "the store of responses cannot be written now; try again")
