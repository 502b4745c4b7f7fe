"""/v1/conversations: conversations that the server keeps, as trees of messages, each answer with the state after it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, Field

from ..engine.kept_states import new_name
from ..engine.presets import PRESETS
from ..text.chat_templates import TEMPLATES
from ..text.thinking import THINKING
from . import named_states
from .bodies import DrawingBody, KeptBody, listed
from .conversation_answers import ConversationAnswer, Setting
from .conversation_store import Conversation, ConversationStore, Message, Role, Tree, new_message
from .errors import ApiError
from .reading import read_tokens
from .server import owner_of, server_of
from .state_pictures import head_norms
from .stream import stream_events

router = APIRouter(prefix="/v1/conversations")
MOST_MESSAGES = 10_000  # of an import
Title = Annotated[str, Field(max_length=200)]


def one_of(kind: str, names: Collection[str]) -> AfterValidator:
    """For a field with a name."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise ValueError(f"there is no {kind} {value[:40]!r}; there is {', '.join(names)}")
        return value

    return AfterValidator(check)


class Settings(DrawingBody):
    """How the answers of a conversation are given. state: the name of the one that it begins from."""

    system: str = ""
    template: Annotated[str | None, one_of("template", TEMPLATES)] = None
    preset: Annotated[str | None, one_of("preset", PRESETS)] = None
    think: Annotated[str | None, one_of("mode of thinking", THINKING)] = None
    max_tokens: int | None = Field(None, ge=0, le=1 << 30)
    state: str | None = None

    def as_kept(self, *, changes: bool = False) -> dict[str, Any]:
        """changes: only what was given."""
        kept = self.model_dump(exclude_unset=changes)
        return kept | ({"stop": [*listed(self.stop)]} if "stop" in kept else {})


class ConversationBody(KeptBody):
    title: Title | None = None
    settings: Settings | None = None


class ChangeBody(ConversationBody):
    leaf: str | None = None


class MessageBody(KeptBody):
    parent: str | None = None
    role: Role
    content: str


class AnswerRequest(KeptBody):
    """A new message of the user behind a parent, or another answer to one that is there, or an answer to go on with.

    picture: tell of the state too.
    """

    parent: str | None = None
    content: str | None = None
    continue_: str | None = Field(None, alias="continue")
    picture: bool = False


class NameBody(KeptBody):
    name: str | None = None


class Usage(KeptBody):
    prompt_tokens: int = Field(ge=0, lt=1 << 53)
    cached_tokens: int = Field(0, ge=0, lt=1 << 53)
    completion_tokens: int = Field(ge=0, lt=1 << 53)


class ImportedMessage(MessageBody):
    id: str = Field(max_length=128)
    reasoning: str = ""
    model: str | None = None
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    usage: Usage | None = None
    tokens_per_second: float | None = Field(None, ge=0, le=1e9)
    created_at: float | None = Field(None, ge=0, le=1e11)


class ImportedConversation(ChangeBody):
    pass


class ImportBody(KeptBody):
    object: Literal["conversation.export"]
    version: Literal[1]
    conversation: ImportedConversation
    messages: list[ImportedMessage] = Field(max_length=MOST_MESSAGES)


def _store(request: Request) -> ConversationStore:
    return ConversationStore(server_of(request), owner_of(request))


async def _find(request: Request, name: str, message: str) -> tuple[ConversationStore, Message]:
    """A message of a conversation, and the store that it is in."""
    store = _store(request)
    tree = await store.tree(await store.get(name))
    return store, tree.find(message)


@router.get("")
async def list_conversations(request: Request) -> dict[str, Any]:
    """The latest first."""
    return {"object": "list", "data": [found.describe() for found in await _store(request).all()]}


@router.post("")
async def create_conversation(body: ConversationBody, request: Request) -> Response:
    conversation = _new(body.title, body.settings)
    return JSONResponse((await _store(request).put(conversation)).describe(), 201)


def _new(title: str | None, settings: Settings | None) -> Conversation:
    now = time.time()
    return Conversation(
        new_name("conv"), title or "", (settings or Settings.model_validate({})).as_kept(), None, now, now
    )


@router.post("/import")
async def import_conversation(body: ImportBody, request: Request) -> Response:
    """A conversation that was exported, with ids of its own."""
    given = body.conversation
    conversation = _new(given.title, given.settings)
    messages: dict[str, Message] = {}  # by the id in the file
    tree = Tree(())
    for i, each in enumerate(body.messages):
        where = f"messages.[{i}]"
        if each.id in messages:
            raise ApiError(400, f"two messages have the id {each.id!r}", f"{where}.id")
        if each.parent is not None and each.parent not in messages:
            what = f"a message must stand behind the one that it follows; {each.parent!r} does not stand before"
            raise ApiError(400, what, f"{where}.parent")
        parent = None if each.parent is None else messages[each.parent].id
        try:
            _check(tree, parent, each)
        except ApiError as error:
            raise ApiError(400, error.message, f"{where}.{error.param}") from None
        about = each.model_dump(include={"reasoning", "model", "finish_reason", "usage", "tokens_per_second"})
        created = (conversation.created if each.created_at is None else each.created_at) + 1e-6 * i
        messages[each.id] = new_message(parent, each.role, each.content, created=created, **about)
        tree.messages[messages[each.id].id] = messages[each.id]
    if given.leaf is not None:
        if given.leaf not in messages:
            raise ApiError(400, f"there is no message {given.leaf!r}", "conversation.leaf")
        conversation = replace(conversation, leaf=messages[given.leaf].id)
    await _store(request).build(conversation, [*messages.values()])
    return JSONResponse(conversation.describe(), 201)


def _check(tree: Tree, parent: str | None, body: MessageBody) -> None:
    tree.check_place(parent, body.role)
    if body.role == "user" and not body.content.strip():
        raise ApiError(400, "the message is empty", "content")


@router.get("/{name}")
async def show_conversation(name: str, request: Request) -> dict[str, Any]:
    """With the messages of all branches, the oldest first."""
    store = _store(request)
    conversation = await store.get(name)
    tree = await store.tree(conversation)
    return conversation.describe() | {"messages": [message.describe() for message in tree.messages.values()]}


@router.post("/{name}")
async def change_conversation(name: str, body: ChangeBody, request: Request) -> dict[str, Any]:
    """Changes what is given."""
    store = _store(request)
    async with store.lock(name):
        conversation = await store.get(name)
        changed = replace(conversation, updated=time.time())
        if body.title is not None:
            changed = replace(changed, title=body.title)
        if body.settings is not None:
            changed = replace(changed, settings=conversation.settings | body.settings.as_kept(changes=True))
        if "leaf" in body.model_fields_set:
            if body.leaf is not None:
                (await store.tree(conversation)).find(body.leaf, "leaf")
            changed = replace(changed, leaf=body.leaf)
        return (await store.put(changed)).describe()


@router.delete("/{name}")
async def delete_conversation(name: str, request: Request) -> dict[str, Any]:
    """With its messages and their states."""
    store = _store(request)
    async with store.lock(name):
        await store.delete(await store.get(name))
    return {"id": name, "object": "conversation.deleted", "deleted": True}


@router.get("/{name}/export")
async def export_conversation(name: str, request: Request) -> dict[str, Any]:
    """All of it but the states."""
    shown = await show_conversation(name, request)
    messages = shown.pop("messages")
    return {"object": "conversation.export", "version": 1, "conversation": shown, "messages": messages}


@router.post("/{name}/messages")
async def add_message(name: str, body: MessageBody, request: Request) -> Response:
    """A message that is written by hand."""
    store = _store(request)
    tree = await store.tree(await store.get(name))
    _check(tree, body.parent, body)
    return JSONResponse((await store.add(name, new_message(body.parent, body.role, body.content))).describe(), 201)


@router.delete("/{name}/messages/{message}")
async def delete_message(name: str, message: str, request: Request) -> dict[str, Any]:
    """With all that follow it."""
    store = _store(request)
    async with store.lock(name):
        conversation = await store.get(name)
        tree = await store.tree(conversation)
        gone = tree.below(message)
        if conversation.leaf in [each.id for each in gone]:
            await store.put(replace(conversation, leaf=gone[0].parent))
        await store.remove(name, gone)
    return {"id": message, "object": "message.deleted", "deleted": True}


@router.post("/{name}/answers")
async def answer(name: str, body: AnswerRequest, request: Request) -> Response:
    """A stream of events; see docs/conversations.md."""
    server, owner, store = server_of(request), owner_of(request), _store(request)
    conversation = await store.get(name)
    tree = await store.tree(conversation)
    setting = await Setting.read(server, owner, conversation.settings)
    call = ConversationAnswer(server, owner, name, setting, picture=body.picture)
    if body.continue_ is not None:
        if body.parent is not None or body.content is not None:
            raise ApiError(
                400, "an answer that is gone on with has its parent; leave parent and content out", "continue"
            )
        message = tree.find(body.continue_, "continue")
        if message.role != "assistant":
            raise ApiError(400, "only an answer can be gone on with", "continue")
        await call.go_on(tree, message)
    else:
        role: Role = "assistant" if body.content is None else "user"
        _check(tree, body.parent, MessageBody(parent=body.parent, role=role, content=body.content or ""))
        await call.reply(tree, body.parent, body.content)
    return await stream_events(call.events(), "", lambda error: {"type": "error", **error.body})


@router.get("/{name}/messages/{message}/state")
async def show_state(name: str, message: str, request: Request) -> dict[str, Any]:
    """A picture of the state after an answer."""
    store, found = await _find(request, name, message)
    state = await store.state(name, found)
    if state is None or found.answer is None:
        raise _no_state(message)
    numbers = {"tokens": found.answer.n_tokens, "bytes": found.state_bytes}
    return {"object": "state"} | numbers | {"layers": head_norms(state)}


@router.post("/{name}/messages/{message}/state")
async def name_state(name: str, message: str, body: NameBody, request: Request) -> Response:
    """Keeps the state after an answer under a name: up to where the next turn begins."""
    server, owner = server_of(request), owner_of(request)
    key = named_states.key_of(owner, body.name)
    store, found = await _find(request, name, message)
    state = await store.state(name, found)
    if state is None or found.answer is None:
        raise _no_state(message)
    model = server.models.find(found.model)
    if state.fingerprint != model.speaker.model.fingerprint:
        raise ApiError(400, f"the state belongs to another model than {model.name!r} is now", "state")
    n_tokens, owed = found.answer.n_tokens, found.answer.owed
    if owed:
        ids = model.speaker.encode(owed, begins=False)
        text = state.texts[0] + owed
        state = (await read_tokens(server, model, ids, state, owner)).with_texts([text])
        n_tokens += len(ids)
    return JSONResponse(await named_states.keep(server, key, state, model, n_tokens, "conversation"), 201)


def _no_state(message: str) -> ApiError:
    return ApiError(404, f"the state after message {message!r} is gone, or never was", "state", "state_not_found")
