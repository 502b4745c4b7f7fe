"""/v1/responses: items answered by items, each response a kept state that any number of others may follow."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..engine.answer_state import AnswerState
from ..engine.kept_states import new_name
from ..text.chat_templates import Prompt
from ..text.tool_calls import AnswerParser
from . import kept_responses
from .answers import Answer
from .errors import ApiError, as_api_error
from .generation import Generation
from .models import ServedModel
from .prompts import answer_decoding
from .response_output import Event, ResponseOutput, usage
from .response_prompts import ResponseBody, ResponsePrompt
from .server import Server, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import TokenNames

router = APIRouter(prefix="/v1/responses")


@router.post("")
async def create_response(body: ResponseBody, request: Request) -> Response:
    """Answers items, perhaps after an earlier response."""
    server, owner = server_of(request), owner_of(request)
    model = server.models.find(body.model)
    call = _Call(server, model, body, await _read(server, model, body, owner), owner)
    await call.generation.submit()
    if body.stream:
        return await stream_events(call.stream(), done="")
    return JSONResponse(await while_connected(request, call.answer()))


@router.post("/input_tokens")
async def count_input_tokens(body: ResponseBody, request: Request) -> dict[str, Any]:
    """How many tokens the input of a response would have."""
    server = server_of(request)
    prompt = await _read(server, server.models.find(body.model), body, owner_of(request))
    return {"object": "response.input_tokens", "input_tokens": prompt.n_tokens}


@router.get("/{name}")
async def show_response(name: str, request: Request) -> dict[str, Any]:
    return (await kept_responses.get(server_of(request), owner_of(request), name)).response


@router.delete("/{name}")
async def delete_response(name: str, request: Request) -> dict[str, Any]:
    await kept_responses.delete(server_of(request), owner_of(request), name)
    return {"id": name, "object": "response", "deleted": True}


@router.post("/{name}/cancel")
async def cancel_response(name: str, request: Request) -> dict[str, Any]:
    await kept_responses.get(server_of(request), owner_of(request), name)
    raise ApiError(400, "only a response with background: true can be cancelled; close the connection of any other")


@router.get("/{name}/input_items")
async def list_input_items(
    name: str, request: Request, limit: int = 20, order: Literal["asc", "desc"] = "desc", after: str | None = None
) -> dict[str, Any]:
    """All that the model was given before it answered, earlier turns included; the latest first, unless asked for."""
    if not 1 <= limit <= 100:
        raise ApiError(400, "limit must be from 1 to 100", "limit")
    items = (await kept_responses.get(server_of(request), owner_of(request), name)).items
    items = items if order == "asc" else items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(400, f"there is no item {after!r}", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": len(page) < len(items)}


async def _read(server: Server, model: ServedModel, body: ResponseBody, owner: str) -> ResponsePrompt:
    """What a body asks the model to read."""
    chat = body.as_chat()
    if isinstance(chat.input, list):
        chat.input = [await kept_responses.resolve(server, owner, item) for item in chat.input]
    previous = None
    if body.previous_response_id is not None:
        previous = await kept_responses.get_previous(server, owner, body.previous_response_id)
    return ResponsePrompt(model, chat, previous)


class _Call:
    """One request."""

    def __init__(self, server: Server, model: ServedModel, body: ResponseBody, reading: ResponsePrompt, owner: str):
        self.server, self.body, self.owner, self.reading = server, body, owner, reading
        prompt, name = reading.prompt, new_name("resp")
        only_one = body.parallel_tool_calls is False
        self.output = ResponseOutput(name, TokenNames(model.speaker.tokenizer), body.with_logprobs)
        self.answered = Answer(prompt, only_one=only_one)
        self.state: AnswerState | None = None
        if body.store is not False:
            self.state = AnswerState(reading.text, reading.n_tokens, prompt.template.separator, strip=True)
        chat = body.as_chat()
        top = (body.top_logprobs or 0) if body.with_logprobs else None
        max_tokens = server.most_tokens if body.max_output_tokens is None else body.max_output_tokens
        self.generation = Generation(
            server,
            model,
            reading.ids,
            reading.text,
            answer_decoding(model, chat, prompt, max_tokens, top, 1),
            stops=prompt.template.stops,
            owner=owner,
            written=prompt.opening + prompt.beginning,
            begin=reading.state,
            keep=() if self.state is None else (self.state,),
            is_over=_ends_with_call(prompt) if only_one and prompt.tools else None,
        )
        form = body.text.format if body.text is not None else None
        efforts = {"effort": None, "summary": None} | (body.reasoning.model_dump() if body.reasoning else {})
        self.response: dict[str, Any] = {
            "id": name,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": model.name,
            "output": [],
            "parallel_tool_calls": not only_one,
            "previous_response_id": body.previous_response_id,
            "reasoning": efforts,
            "store": self.state is not None,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
        }

    async def answer(self) -> dict[str, Any]:
        async for each in self.events():
            last = each
        response: dict[str, Any] = last["response"]
        return response

    async def stream(self) -> AsyncGenerator[str, None]:
        yield self._told("created")
        yield self._told("in_progress")
        try:
            async for each in self.events():
                yield event(each, each["type"])
        except Exception as error:
            found = as_api_error(error)
            failed = {"status": "failed", "error": {"code": found.code or "server_error", "message": found.message}}
            self.response |= failed | {"output": self.output.items}
            yield self._told("failed")

    def _told(self, kind: str) -> str:
        each = self.output.event(kind, response=self.response)
        return event(each, each["type"])

    async def events(self) -> AsyncGenerator[Event, None]:
        """All from the first item on; the last one has the whole response, which is kept by then."""
        reason = None
        try:
            async for piece in self.generation.pieces():
                taken = self.answered.take(piece)
                reason = taken.finish_reason
                for each in self.output.add(taken):
                    yield each
        finally:
            self.generation.cancel()
        status = "incomplete" if reason == "length" else "completed"
        for each in self.output.finish(status):
            yield each
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = self.reading.n_known + self.generation.cached_tokens
        numbers = usage(self.reading.n_tokens, cached, self.answered.written, self.answered.thought)
        self.response |= {"status": status, "output": self.output.items, "usage": numbers}
        if self.state is not None:
            end, reading = self.state.ending, self.reading
            assert end is not None
            continues, rest = bool(reading.prompt.beginning), (end.n_tokens, end.owed, end.state)
            kept = kept_responses.KeptResponse(self.response, reading.items, continues, reading.front, *rest)
            if not await kept_responses.keep(self.server, self.owner, kept):
                self.response["store"] = False
        yield self.output.event(status, response=self.response)


def _ends_with_call(prompt: Prompt) -> Callable[[str], bool]:
    """Whether an answer has called a tool, from its pieces."""
    parser = AnswerParser(prompt.tools, opening=prompt.opening, beginning=prompt.beginning)

    def ends(piece: str) -> bool:
        parser.feed(piece)
        return parser.has_called

    return ends
