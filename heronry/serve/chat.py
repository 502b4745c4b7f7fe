"""POST /v1/chat/completions: lists of messages answered, with thoughts and calls of tools."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from ..engine.chat import choose_template
from ..engine.completion import Completion, TokenLogprob
from ..engine.constraints import Grammar
from ..engine.presets import preset_by_name
from ..engine.sampling import Sampling
from ..engine.tool_grammars import call_grammar
from ..text.chat_templates import Prompt, Template, prepare
from ..text.thinking import EFFORTS
from ..text.tool_calls import AnswerParser
from ..text.tool_styles import style_by_name
from ..text.tools import Tool, ToolCall, read_tools
from .bodies import SamplingBody
from .errors import ApiError
from .generation import Generation
from .models import ServedModel
from .server import Server, new_id, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import TokenNames, chat_logprob

router = APIRouter()


class TemplateOptions(BaseModel):
    """What vLLM's clients send for the template."""

    enable_thinking: bool | None = None


class ChatBody(SamplingBody):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=0, le=1 << 30)
    max_tokens: int | None = Field(None, ge=0, le=1 << 30, description="the old name")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_style: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_think: bool | None = None
    think: str | bool | None = Field(None, description="a mode of thinking, or whether to think")
    opening: str | None = None
    continue_final_message: bool = False
    preserve_reasoning: bool = False
    preset: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answers a list of messages."""
    server = server_of(request)
    call = _Call(server, server.models.find(body.model), body, owner_of(request))
    await call.generation.submit()
    if body.stream:
        return await stream_events(call.stream())
    return JSONResponse(await while_connected(request, call.answer()))


class _Call:
    """One request: a prompt with n answers."""

    def __init__(self, server: Server, model: ServedModel, body: ChatBody, owner: str):
        _check(body)
        self.body, self.names = body, TokenNames(model.speaker.tokenizer)
        prompt, call = _read_prompt(model, body)
        self.ids = [
            *model.speaker.encode(prompt.context, begins=True),
            *model.speaker.tokenizer.encode(prompt.beginning),
        ]
        top = (body.top_logprobs or 0) if body.logprobs else None
        limits = (body.max_completion_tokens, body.max_tokens, server.most_tokens)
        max_tokens = next(limit for limit in limits if limit is not None)
        n = body.n or 1
        default = Sampling().replace(**prompt.template.sampling)
        if body.preset is not None:
            default = preset_by_name(body.preset)
        self.answers = [_Answer(self, prompt) for _ in range(n)]
        decoding = body.decoding(model, max_tokens, default, top, n)
        self.generation = Generation(
            server,
            model,
            self.ids,
            prompt.text,
            decoding if call is None else replace(decoding, grammar=call),
            stops=prompt.template.stops,
            owner=owner,
            written=prompt.opening + prompt.beginning,
        )
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}

    async def pieces(self) -> AsyncGenerator[tuple[int, _Piece], None]:
        """The pieces of all answers, each with its number."""
        async for piece in self.generation.pieces():
            i = piece.choice
            taken = self.answers[i].take(piece)
            if taken.finish_reason is not None:
                self.generation.stop(i)
            yield i, taken

    async def answer(self) -> dict[str, Any]:
        parts: list[list[_Piece]] = [[] for _ in self.answers]
        async for i, piece in self.pieces():
            parts[i].append(piece)
        choices = [self._choice(i, pieces) for i, pieces in enumerate(parts)]
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _choice(self, i: int, pieces: Sequence[_Piece]) -> dict[str, Any]:
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


class _Piece:
    """What is new of an answer. logprobs: of the tokens of its content."""

    def __init__(self, reasoning: str, content: str, calls: list[ToolCall], reason: str | None):
        self.reasoning, self.content, self.calls, self.finish_reason = reasoning, content, calls, reason
        self.logprobs: list[TokenLogprob] = []


class _Answer:
    """Takes the text of one answer apart.

    written: its tokens so far; thought: those of them that were thoughts.
    """

    def __init__(self, call: _Call, prompt: Prompt):
        body = call.body
        self.parser = AnswerParser(prompt.tools, opening=prompt.opening, beginning=prompt.beginning, stops=body.stops)
        self.only_one = body.parallel_tool_calls is False
        self.any_call = False
        self.written = self.thought = 0
        self.held: list[TokenLogprob] = []  # of tokens whose text is held

    def take(self, piece: Completion) -> _Piece:
        """The next piece; it has a finish_reason where the answer is over, which may be before the text is."""
        self.written = piece.usage.completion_tokens
        new = self.parser.feed(piece.text)
        reasoning, content, calls = new
        reason: str | None = piece.finish_reason
        if self.parser.stopped or (self.only_one and self.parser.has_called):
            reason = "stop"
        if reason is not None:
            rest = self.parser.finish()
            reasoning, content, calls = reasoning + rest.reasoning, content + rest.content, calls + rest.calls
        if self.parser.is_thinking or (reasoning and not content):
            self.thought = self.written
        if self.only_one:
            calls = calls[: 0 if self.any_call else 1]
        self.any_call |= bool(calls)
        if self.any_call and reason is not None:
            reason = "tool_calls"
        found = _Piece(reasoning, content, calls, reason)
        self.held += piece.logprobs or ()
        if content:
            found.logprobs, self.held = self.held, []
        elif reasoning or calls:
            self.held = []
        return found


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
    for name in ("audio", "web_search_options"):
        if getattr(body, name) is not None:
            raise ApiError(400, f"{name} is not served here", name)
    if body.modalities not in (None, ["text"]):
        raise ApiError(400, "only text is written here", "modalities")


def _read_prompt(model: ServedModel, body: ChatBody) -> tuple[Prompt, Grammar | None]:
    """The prompt that a request asks for, and the form of the answer if it must be a call."""
    speaker = model.speaker
    template = choose_template(speaker, None)
    plain = isinstance(template, Template)
    style = body.tool_style or (speaker.tool_style if plain else None)
    used = style or (template.tool_style if isinstance(template, Template) else None)
    tools, call = _choose_tools(body, used)
    opening = body.opening or (call if plain else None)
    if opening is None and plain and tools and body.read_grammar() is not None:
        opening = "plain"  # the answer has the form that is asked for, not that of a call
    prompt = prepare(
        body.messages,
        template,
        tools=tools,
        tool_style=style,
        think=_choose_thinking(body),
        opening=opening,
        continue_final_message=body.continue_final_message,
        preserve_reasoning=body.preserve_reasoning,
    )
    must_call = used is not None and call is not None and prompt.opening.strip() == call.strip()
    return prompt, call_grammar(tools.values(), style_by_name(str(used))) if must_call else None


def _choose_tools(body: ChatBody, style: str | None) -> tuple[dict[str, Tool], str | None]:
    """The tools that may be called, and what the answer begins with if one must be."""
    tools, choice = read_tools(body.tools), body.tool_choice
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return {}, None
    if not tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools") or {}
        named = read_tools(allowed.get("tools"))
        if unknown := [name for name in named if name not in tools]:
            raise ApiError(400, f"tool_choice allows {unknown[0]!r}, which is not among the tools", "tool_choice")
        tools, choice = {name: tools[name] for name in named}, allowed.get("mode", "auto")
        if choice == "auto":
            return tools, None
    if style is None:
        return tools, None
    if choice == "required":
        return tools, f" {style_by_name(style).begin_call()}"
    name = (choice.get("function") or {}).get("name") if isinstance(choice, dict) else None
    if name not in tools:
        raise ApiError(400, "tool_choice must be none, auto, required or one of the tools", "tool_choice")
    return {str(name): tools[str(name)]}, f" {style_by_name(style).begin_call(str(name))}"


def _choose_thinking(body: ChatBody) -> str | None:
    """The mode of thinking; None = that of the template."""
    if isinstance(body.think, str):
        return body.think
    if body.reasoning_effort is not None:
        if body.reasoning_effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise ApiError(400, f"reasoning_effort must be one of {known}", "reasoning_effort")
        return EFFORTS[body.reasoning_effort]
    options = body.chat_template_kwargs
    switches = (body.think, body.enable_think, options.enable_thinking if options else None)
    switch = next((switch for switch in switches if switch is not None), None)
    return None if switch is None else "open" if switch else "fake"
