"""Conversations that the server keeps: trees of messages, each an entry of the store, so that two pages that write at
the same time never overwrite each other's.

A message of an answer has the state after it as its bytes. Messages are kept under the id of their conversation in
place of a tenant: it is found under its owner alone, and nobody guesses it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..engine.kept_states import new_name
from ..errors import InputError
from ..models import State
from ..stores.store import Entry, Key
from .errors import ApiError
from .server import Server

CONVERSATION, MESSAGE = "conversation", "message"
MOST_LISTED = 1 << 20
Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Conversation:
    """
    leaf: the message that was last looked at.
    created, updated: in seconds since 1970.
    """

    id: str
    title: str
    settings: dict[str, Any]
    leaf: str | None
    created: float
    updated: float

    def describe(self) -> dict[str, Any]:
        """As clients see it."""
        return {
            "id": self.id,
            "object": "conversation",
            "title": self.title,
            "created_at": int(self.created),
            "updated_at": int(self.updated),
            "leaf": self.leaf,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class KeptAnswer:
    """What is known of the state after an answer.

    front: what stood in front of the messages; see `front_of`.
    n_prompt: tokens in front of the answer; n_tokens: that the state has read; owed: what it has not, up to where the
        next turn begins.
    opening, beginning: of the answer, that the model did not write.
    tokens: of the answer, if it was cut, so that it can go on.
    """

    front: str
    n_prompt: int
    n_tokens: int
    owed: str
    opening: str
    beginning: str
    tokens: list[int] | None


@dataclass(frozen=True)
class Message:
    """
    parent: the message that it follows; None = it begins the conversation.
    state_bytes: of the state after it; 0 = there is none.
    """

    id: str
    parent: str | None
    role: Role
    content: str
    reasoning: str = ""
    model: str | None = None
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    tokens_per_second: float | None = None
    created: float = field(default_factory=time.time)
    answer: KeptAnswer | None = None
    state_bytes: int = 0

    def describe(self) -> dict[str, Any]:
        """As clients see it."""
        hidden = ("created", "answer", "state_bytes")
        told = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in hidden}
        size = self.state_bytes
        more = {"state_bytes": size or None, "has_state": size > 0, "created_at": int(self.created)}
        return {"object": "message"} | told | more

    def in_openais_form(self) -> dict[str, Any]:
        """As templates take it."""
        thought = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return {"role": self.role, "content": self.content} | thought


def new_message(parent: str | None, role: Role, content: str, **fields: Any) -> Message:
    return Message(new_name("msg"), parent, role, content, **fields)


class Tree:
    """The messages of one conversation, the oldest first."""

    def __init__(self, messages: Iterable[Message]):
        self.messages = {message.id: message for message in sorted(messages, key=lambda message: message.created)}

    def find(self, name: str, param: str = "message") -> Message:
        """ApiError where there is none."""
        if name not in self.messages:
            raise message_not_found(name, param)
        return self.messages[name]

    def path(self, leaf: str | None) -> list[Message]:
        """The messages from the first to this one; ApiError if the store has dropped one of them."""
        path: list[Message] = []
        while leaf is not None:
            if leaf not in self.messages:
                what = f"message {leaf!r} is gone: the store has dropped it to make room"
                raise ApiError(409, f"{what}; begin another branch", "parent", "message_gone")
            path.append(self.messages[leaf])
            leaf = path[-1].parent
        return path[::-1]

    def below(self, name: str) -> list[Message]:
        """This message and all that follow it."""
        children: dict[str | None, list[Message]] = {}
        for message in self.messages.values():
            children.setdefault(message.parent, []).append(message)
        found, waiting = [], [self.find(name)]
        while waiting:
            found.append(waiting.pop())
            waiting += children.get(found[-1].id, [])
        return found

    def check_place(self, parent: str | None, role: Role) -> None:
        """ApiError if such a message cannot follow this one: an answer follows a message of the user."""
        before = None if parent is None else self.find(parent, "parent")
        if role == "assistant" and (before is None or before.role != "user"):
            raise ApiError(400, "an answer must follow a message of the user", "parent")


class ConversationStore:
    """Those of one owner. All methods but `lock` may wait for the store, in a thread."""

    def __init__(self, server: Server, owner: str):
        self._server, self._kept, self._owner = server, server.conversations, owner

    def lock(self, name: str) -> asyncio.Lock:
        """To be held from reading a conversation to writing it."""
        return self._server.locks.setdefault(name, asyncio.Lock())

    async def all(self) -> list[Conversation]:
        """The latest first."""
        entries = await asyncio.to_thread(self._kept.store.entries, CONVERSATION, self._owner, MOST_LISTED)
        self._check_readable()
        return sorted(map(_conversation, entries), key=lambda found: found.updated, reverse=True)

    async def get(self, name: str) -> Conversation:
        """ApiError where there is none."""
        try:
            key = Key(CONVERSATION, self._owner, name)
        except InputError:
            entry = None
        else:
            entry = await asyncio.to_thread(self._find, key)
        if entry is None:
            raise ApiError(404, f"there is no conversation {name!r}", "conversation", "conversation_not_found")
        return _conversation(entry)

    def _find(self, key: Key) -> Entry | None:
        entry = self._kept.store.get(key, with_data=False)
        if entry is None:
            self._check_readable()
        return entry

    def _check_readable(self) -> None:
        if not self._kept.store.is_readable:
            raise ApiError(503, "the store of conversations cannot be read now; try again")

    async def tree(self, conversation: Conversation) -> Tree:
        entries = await asyncio.to_thread(self._kept.store.entries, MESSAGE, conversation.id, MOST_LISTED)
        self._check_readable()
        return Tree(map(_message, entries))

    async def put(self, conversation: Conversation) -> Conversation:
        """Keeps it; ApiError if it cannot be kept."""
        await asyncio.to_thread(self._put, conversation)
        return conversation

    def _put(self, conversation: Conversation) -> None:
        about = {each.name: getattr(conversation, each.name) for each in fields(conversation) if each.name != "id"}
        if not self._kept.put(Key(CONVERSATION, self._owner, conversation.id), None, about):
            raise _cannot_keep()

    async def add(self, name: str, message: Message, state: State | None = None, *, replaces: bool = False) -> Message:
        """Keeps a message, which is now the leaf of its conversation. replaces: one of this id.

        Raises:
            ApiError: the conversation or a message that this needs was deleted meanwhile; or it cannot be kept.
        """
        async with self.lock(name):
            conversation = await self.get(name)
            for needed in (message.parent, message.id if replaces else None):
                if needed is not None and await asyncio.to_thread(self._find, Key(MESSAGE, name, needed)) is None:
                    raise message_not_found(needed, "parent")
            kept = await asyncio.to_thread(self._put_message, name, message, state)
            await self.put(replace(conversation, leaf=message.id, updated=time.time()))
            return kept

    def _put_message(self, conversation: str, message: Message, state: State | None) -> Message:
        """With its state; without it where that alone cannot be kept."""
        about = {each.name: getattr(message, each.name) for each in fields(message) if each.name != "id"}
        about["answer"] = None if message.answer is None else vars(message.answer)
        key = Key(MESSAGE, conversation, message.id)
        data = b"" if state is None else state.to_bytes()
        if data and self._kept.store.put(key, data, about):
            return replace(message, state_bytes=len(data))
        if not self._kept.store.put(key, b"", about):
            raise _cannot_keep()
        return replace(message, state_bytes=0)

    async def state(self, conversation: str, message: Message) -> State | None:
        """After a message; None = it is gone."""
        kept = await asyncio.to_thread(self._kept.get, Key(MESSAGE, conversation, message.id))
        return None if kept is None else kept.state

    async def build(self, conversation: Conversation, messages: Sequence[Message]) -> None:
        """Keeps a whole conversation, which is there once all of it is."""

        def put_all() -> None:
            for message in messages:
                self._put_message(conversation.id, message, None)
            self._put(conversation)

        await asyncio.to_thread(put_all)

    async def remove(self, conversation: str, messages: Iterable[Message]) -> None:
        """Those that follow others first: whatever happens in between, what is left is a tree."""
        keys = [Key(MESSAGE, conversation, message.id) for message in messages]
        await asyncio.to_thread(lambda: [self._kept.store.delete(key) for key in reversed(keys)])

    async def delete(self, conversation: Conversation) -> None:
        tree = await self.tree(conversation)
        key = Key(CONVERSATION, self._owner, conversation.id)
        if not await asyncio.to_thread(self._kept.store.delete, key):
            raise ApiError(503, "the store of conversations cannot be written now; try again")
        await self.remove(conversation.id, tree.messages.values())


def message_not_found(name: str, param: str) -> ApiError:
    return ApiError(404, f"there is no message {name!r} in this conversation", param, "message_not_found")


def _cannot_keep() -> ApiError:
    error = ApiError(507, "the conversation cannot be kept: the store is full, or cannot be written now")
    error.headers["x-should-retry"] = "false"
    return error


def _conversation(entry: Entry) -> Conversation:
    return Conversation(entry.key.name, **entry.about)


def _message(entry: Entry) -> Message:
    about: Mapping[str, Any] = entry.about
    answer = None if about["answer"] is None else KeptAnswer(**about["answer"])
    return Message(entry.key.name, **{**about, "answer": answer, "state_bytes": entry.size})
