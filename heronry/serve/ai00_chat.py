"""Ai00's chat: messages shown by a template that the body may bring, and answers in its own shape."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field

from .ai00 import WritingBody, begin_writing, describe_usage, error_shape
from .bodies import DialectBody
from .errors import ApiError
from .generation import Generation, collect_all
from .models import ServedModel
from .stream import event, stream_events, while_connected

router = APIRouter()


def _read_role(role: object) -> object:
    role = role.capitalize() if isinstance(role, str) else role
    return "Observation" if role == "Tool" else role


Role = Annotated[Literal["System", "User", "Assistant", "Observation"], BeforeValidator(_read_role)]


class Record(DialectBody):
    role: Role = "System"
    content: str = ""


class RecordTemplate(DialectBody):
    """How messages are shown: each as `record`, with `sep` between them, and `prefix` where the answer begins."""

    record: str = "{role}: {content}"
    prefix: str = "{assistant}:"
    sep: str = "\n\n"


class ChatBody(WritingBody):
    messages: Record | list[Record]
    names: dict[Role, str] = Field({}, description="how roles are called in the prompt")
    template: RecordTemplate = RecordTemplate()

    def render(self) -> str:
        """The prompt."""
        records = [self.messages] if isinstance(self.messages, Record) else self.messages
        if not records:
            raise ApiError(400, "there are no messages", "messages")
        names = {role: self.names.get(role, role) for role in ("System", "User", "Assistant", "Observation")}
        shown = [
            _fill(self.template.record, role=names[record.role], content=_clean(record.content)) for record in records
        ]
        begin = _fill(self.template.prefix, **{role.lower(): name for role, name in names.items()})
        return self.template.sep.join([*shown, begin])


def _fill(form: str, **values: str) -> str:
    """The form with values in place of their names in braces; all else in it is text."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), form)


def _clean(content: str) -> str:
    return re.sub(r"\n(\s*\n)+", "\n", content).strip()


@router.post("/api/oai/chat/completions")
@router.post("/api/oai/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers messages."""
    model, generation, read = await begin_writing(body, request, body.render())
    if body.stream:
        return await stream_events(_stream(generation, model, read), error_shape=error_shape)
    [[found]] = await while_connected(request, collect_all([generation]))
    message = {"role": "Assistant", "content": found.text.strip()}
    choice = {"message": message, "index": 0, "finish_reason": found.finish_reason}
    usage = describe_usage(generation, read, found.usage.completion_tokens)
    return JSONResponse({"object": "chat.completion", "model": model.path, "choices": [choice], "usage": usage})


async def _stream(generation: Generation, model: ServedModel, read: int) -> AsyncGenerator[str, None]:
    head = {"object": "chat.completion.chunk", "model": model.path}

    def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> str:
        return event(head | {"choices": [{"delta": delta, "index": 0, "finish_reason": reason}]} | more)

    yield chunk({"role": "Assistant"})
    said, held = False, ""  # white space around the answer is no part of it
    async for piece in generation.pieces():
        text = held + piece.text if said else piece.text.lstrip()
        new = text.rstrip()
        held = text[len(new) :]
        if new:
            said = True
            yield chunk({"content": new})
        if piece.finish_reason is not None:
            usage = describe_usage(generation, read, piece.usage.completion_tokens)
            yield chunk({}, piece.finish_reason, usage=usage)
