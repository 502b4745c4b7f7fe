"""POST /v1/chat/completions: lists of messages answered, with thoughts and calls of tools."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..models import State
from ..text.tools import ToolCall
from .answers import Answer, AnswerPiece
from .errors import ApiError, shape_for
from .generation import Generation
from .lightning_bodies import find_model, uploaded_state
from .lightning_chat import LightningFields, continue_raw_texts, recognize
from .models import ServedModel
from .prompts import answer_decoding, prompt_ids, read_prompt
from .server import Server, new_id, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import PROMPT_LOGPROBS, TokenNames, chat_logprob, prompt_column

router = APIRouter(dependencies=[Depends(recognize)])

# who speaks, in place of the template's words
SPEAKER: Any = Field(None, max_length=64, pattern=r"^\w+( \w+)*$", description="as in RWKV-Runner")


class ChatBody(LightningFields):
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = PROMPT_LOGPROBS
    continue_final_message: bool = False
    prefix: bool = Field(False, description="RWKV-Runner's word for continue_final_message")
    user_name: str | None = SPEAKER
    assistant_name: str | None = SPEAKER
    system_name: str | None = SPEAKER
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None


@router.post("/v1/chat/completions")
@router.post("/openai/v1/chat/completions")
@router.post("/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers a list of messages."""
    if body.has_raw_texts:
        return await continue_raw_texts(request)
    if body.messages is None and body.contents is None:
        raise ApiError(400, "Field required", "messages")
    model = find_model(request, body)
    begin = await uploaded_state(request, model, body)
    call = _Call(server_of(request), model, body.in_openais_words(), owner_of(request), begin)
    await call.generation.submit()
    if body.stream:
        return await stream_events(call.stream(), error_shape=shape_for(request))
    return JSONResponse(await while_connected(request, call.answer()))


class _Call:
    """One request: a prompt with n answers."""

    def __init__(self, server: Server, model: ServedModel, body: ChatBody, owner: str, begin: State | None):
        _check(body)
        assert body.messages is not None
        self.body, self.names = body, TokenNames(model.speaker.tokenizer)
        goes_on = body.continue_final_message or body.prefix
        names = {x: name for x in ("user", "assistant", "system") if (name := getattr(body, f"{x}_name"))}
        prompt = read_prompt(model, body.messages, body, names=names, continue_final_message=goes_on)
        self.ids = prompt_ids(model, prompt, begins=begin is None)
        top = (body.top_logprobs or 0) if body.logprobs else None
        limits = (body.max_completion_tokens, body.max_tokens, server.most_tokens)
        max_tokens = next(limit for limit in limits if limit is not None)
        n = body.n or 1
        only_one = body.parallel_tool_calls is False
        self.answers = [Answer(prompt, body.stops, only_one) for _ in range(n)]
        self.generation = Generation(
            server,
            model,
            self.ids,
            prompt.text,
            answer_decoding(model, body, prompt, max_tokens, top, n),
            stops=prompt.template.stops,
            prompt_logprobs=body.prompt_logprobs,
            owner=owner,
            written=prompt.opening + prompt.beginning,
            begin=begin,
        )
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}

    async def pieces(self) -> AsyncGenerator[tuple[int, AnswerPiece], None]:
        """The pieces of all answers, each with its number."""
        async for piece in self.generation.pieces():
            i = piece.choice
            taken = self.answers[i].take(piece)
            if taken.finish_reason is not None:
                self.generation.stop(i)
            yield i, taken

    async def answer(self) -> dict[str, Any]:
        parts: list[list[AnswerPiece]] = [[] for _ in self.answers]
        async for i, piece in self.pieces():
            parts[i].append(piece)
        choices = [self._choice(i, pieces) for i, pieces in enumerate(parts)]
        found = self.head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}
        if self.body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_column(self.names, self.generation.prompt_logprobs)
        return found

    def _choice(self, i: int, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        calls = [_describe(call) for piece in pieces for call in piece.calls]
        content = "".join(piece.content for piece in pieces)
        reasoning = "".join(piece.reasoning for piece in pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"refusal": None} | ({"tool_calls": calls} if calls else {})
        entries = [chat_logprob(self.names, entry) for piece in pieces for entry in piece.logprobs]
        return {
            "index": i,
            "message": message,
            "logprobs": {"content": entries, "refusal": None} if self.body.logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    async def stream(self) -> AsyncGenerator[str, None]:
        head = self.head | {"object": "chat.completion.chunk"} | ({"usage": None} if self.body.include_usage else {})

        def chunk(i: int, delta: dict[str, Any], logprobs: object = None, reason: str | None = None) -> str:
            choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return event(head | {"choices": [choice]})

        for i in range(len(self.answers)):  # in order: the official client needs 0 before 1
            yield chunk(i, {"role": "assistant", "content": ""})
        called = [0] * len(self.answers)
        async for i, piece in self.pieces():
            if piece.reasoning:
                yield chunk(i, {"reasoning_content": piece.reasoning})
            if piece.content:
                entries = [chat_logprob(self.names, entry) for entry in piece.logprobs]
                yield chunk(i, {"content": piece.content}, {"content": entries} if self.body.logprobs else None)
            for call in piece.calls:
                number = {"index": called[i]}
                called[i] += 1
                begun, arguments = _describe(call), call.arguments
                begun["function"]["arguments"] = ""
                yield chunk(i, {"tool_calls": [number | begun]})
                yield chunk(i, {"tool_calls": [number | {"function": {"arguments": arguments}}]})
            if piece.finish_reason is not None:
                yield chunk(i, {}, reason=piece.finish_reason)
        if self.body.include_usage:
            yield event(head | {"choices": [], "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        written = sum(answer.written for answer in self.answers)
        return {
            "prompt_tokens": len(self.ids),
            "completion_tokens": written,
            "total_tokens": len(self.ids) + written,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(answer.thought for answer in self.answers)},
        }


def _describe(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _check(body: ChatBody) -> None:
    """ApiError for what contradicts itself or is not served."""
    if not body.messages:
        raise ApiError(400, "there are no messages", "messages")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs are not for streams", "prompt_logprobs")
    for name in ("audio", "web_search_options"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} is not served here", name)
    if body.modalities not in (None, ["text"]):
        raise ApiError(400, "only text is written here", "modalities")
