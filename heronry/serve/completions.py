"""POST /v1/completions: texts and token ids continued, with echo and log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..engine.answer_state import AnswerState
from ..engine.completion import Completion, TokenLogprob
from ..engine.sampling import Sampling
from ..text.chat_templates import FIM_STOPS
from . import named_states
from .bodies import SamplingBody, Texts, split_texts
from .errors import ApiError
from .generation import Generation, cancel_all, collect_all, merge, submit_all
from .models import ServedModel
from .named_states import Begin, InlineState
from .reading import read_ending
from .server import Server, new_id, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import PROMPT_LOGPROBS, TokenNames, columns, prompt_column

router = APIRouter()
PLAIN = Sampling()  # temperature 1 and no cut, as OpenAI's users and lm-evaluation-harness expect


class CompletionBody(SamplingBody):
    prompt: Texts
    max_tokens: int | None = Field(16, ge=0, le=1 << 30)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    prompt_logprobs: int | None = PROMPT_LOGPROBS
    best_of: int | None = Field(None, ge=1, le=1024)
    add_special_tokens: bool | None = Field(None, description="begin with the tokens that the model's texts begin with")
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    include_stop_str_in_output: bool | None = None
    suffix: str | None = Field(None, description="what comes behind: the text between is written")
    state: str | InlineState | None = Field(None, description="what the prompt goes on from: a name, or a state itself")
    save_state: str | None = Field(None, description="the name under which the state after the completion is kept")
    return_state: bool | None = Field(None, description="with every completion, the state after it")


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continues texts, or lists of token ids."""
    server = server_of(request)
    model, owner = server.models.find(body.model), owner_of(request)
    call = _Call(server, model, body, owner, await named_states.begin_from(server, model, owner, body.state))
    await submit_all(call.generations)
    if body.stream:
        return await stream_events(call.stream())
    return JSONResponse(await while_connected(request, call.answer()))


class _Call:
    """All prompts of one request, each with n completions; a choice's index is i * n + k."""

    def __init__(self, server: Server, model: ServedModel, body: CompletionBody, owner: str, begin: Begin | None):
        self.server, self.body, self.model, self.owner, self.begin = server, body, model, owner, begin
        self.save_as = None if body.save_state is None else named_states.key_of(owner, body.save_state)
        self.n, self.rows = body.n or 1, body.best_of or body.n or 1
        _check(body, self.n)
        tokenizer = model.speaker.tokenizer
        self.names = TokenNames(tokenizer, bool(body.return_tokens_as_token_ids))
        prompts, stops = split_texts(body.prompt, "prompt"), body.stops
        if body.suffix is not None:
            prompts, stops = [_with_gap(model, prompt, body.suffix) for prompt in prompts], (*stops, *FIM_STOPS)
        self.encoded = [
            model.speaker.encode(prompt, begins=begin is None and bool(body.add_special_tokens)) for prompt in prompts
        ]
        self.texts = [x if isinstance(x, str) else tokenizer.decode(x) for x in prompts]
        top = body.logprobs if self.rows == self.n else body.logprobs or 0
        max_tokens = server.most_tokens if body.max_tokens is None else body.max_tokens
        decoding = body.decoding(model, max_tokens, PLAIN, top, self.rows)
        options: dict[str, Any] = {"stops": stops, "keep_stop": bool(body.include_stop_str_in_output)}
        of_prompt = [x for x in (body.logprobs if body.echo else None, body.prompt_logprobs) if x is not None]
        options |= {"prompt_logprobs": max(of_prompt, default=None), "owner": owner}
        options |= {"begin": begin and begin.state}
        before = begin.state.texts[0] if begin else ""
        wanted = self.rows if body.return_state or self.save_as else 0
        self.states = [
            [AnswerState(before + text, len(ids)) for _ in range(wanted)]
            for text, ids in zip(self.texts, self.encoded, strict=True)
        ]
        self.generations = [
            Generation(server, model, ids, text, decoding, keep=keep, **options)
            for ids, text, keep in zip(self.encoded, self.texts, self.states, strict=True)
        ]
        self.head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    async def answer(self) -> dict[str, Any]:
        found = await collect_all(self.generations)
        written = sum(x.usage.completion_tokens for completions in found for x in completions)
        choices = []
        for i, completions in enumerate(found):
            best = sorted(completions, key=_mean_logprob, reverse=True)[: self.n]
            for k, completion in enumerate(best if self.rows > self.n else completions):
                choices.append(_Choice(self, i, i * self.n + k).part(completion) | await self._state_of(i, completion))
        return self.head | {"choices": choices, "usage": self._usage(written)}

    async def stream(self) -> AsyncGenerator[str, None]:
        parts: dict[int, _Choice] = {}
        written: dict[int, int] = {}
        usage: dict[str, Any] = {"usage": None} if self.body.include_usage else {}
        try:
            async for i, piece in merge([generation.pieces() for generation in self.generations]):
                index = i * self.n + piece.choice
                part = parts.setdefault(index, _Choice(self, i, index)).part(piece)
                written[index] = piece.usage.completion_tokens
                if self.body.continuous_usage:
                    usage = {"usage": self._usage(sum(written.values()))}
                yield event(self.head | {"choices": [part | await self._state_of(i, piece)]} | usage)
            if self.body.include_usage:
                yield event(self.head | {"choices": [], "usage": self._usage(sum(written.values()))})
        finally:
            cancel_all(self.generations)

    async def _state_of(self, i: int, piece: Completion) -> dict[str, Any]:
        """What a choice has besides, at its end, where its state was asked for."""
        if not self.states[i] or piece.finish_reason is None:
            return {}
        ending = self.states[i][piece.choice].ending
        assert ending is not None
        state, n_tokens = await read_ending(self.server, self.model, ending, self.owner)
        found: dict[str, Any] = {}
        if self.save_as is not None:
            known = 0 if self.begin is None else self.begin.n_tokens
            total = None if known is None else known + n_tokens
            found = await named_states.keep(self.server, self.save_as, state, self.model, total, "completion")
        if self.body.return_state:
            found |= await asyncio.to_thread(named_states.inline, state, self.model)
        return {"state": found}

    def _usage(self, written: int) -> dict[str, Any]:
        read = sum(map(len, self.encoded))
        cached = sum(generation.cached_tokens for generation in self.generations)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class _Choice:
    """One completion on its way out, in one part or in many."""

    def __init__(self, call: _Call, prompt: int, index: int):
        self.call, self.prompt, self.index = call, prompt, index
        self.offset = 0  # in characters, of the next token
        self.begun = False

    def part(self, piece: Completion) -> dict[str, Any]:
        """The next piece, or all of it."""
        call, body = self.call, self.call.body
        generation = call.generations[self.prompt]
        text = piece.text
        entries: list[TokenLogprob | int] = [*(piece.logprobs or ())]
        if piece.finish_reason is not None and (end := generation.last_logprobs.get(piece.choice)) is not None:
            entries.append(end)  # the end of text is a token too, without a text
        if not self.begun and body.echo:
            text = call.texts[self.prompt] + text
            told = [entry.with_top(body.logprobs or 0) for entry in generation.prompt_logprobs]
            entries = [call.encoded[self.prompt][0], *told, *entries]
        elif not self.begun:
            self.offset = len(call.texts[self.prompt])
        ids: dict[str, list[int]] = {}
        if body.return_token_ids:
            ids = {} if self.begun else {"prompt_token_ids": call.encoded[self.prompt]}
            ids["token_ids"] = piece.token_ids
        self.begun = True
        logprobs = None
        if body.logprobs is not None:
            logprobs, self.offset = columns(call.names, entries, self.offset)
        stopped_by = generation.stopped_by.get(piece.choice) if piece.finish_reason is not None else None
        reasons = {"finish_reason": piece.finish_reason, "stop_reason": stopped_by}
        of_prompt: dict[str, Any] = {}
        if body.prompt_logprobs is not None:
            column = [entry.with_top(body.prompt_logprobs) for entry in generation.prompt_logprobs]
            of_prompt["prompt_logprobs"] = prompt_column(call.names, column)
        return {"index": self.index, "text": text, "logprobs": logprobs} | reasons | ids | of_prompt


def _check(body: CompletionBody, n: int) -> None:
    """ApiError for fields that contradict each other."""
    if body.save_state is not None and (
        n > 1 or (body.best_of or 1) > 1 or len(split_texts(body.prompt, "prompt")) > 1
    ):
        raise ApiError(400, "save_state needs one prompt with one completion", "save_state")
    if body.best_of is not None and body.best_of < n:
        raise ApiError(400, f"best_of must be at least n, which is {n}", "best_of")
    if body.best_of is not None and body.best_of > n and body.stream:
        raise ApiError(400, "best_of cannot be streamed: which is best shows at the end", "best_of")
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs are not for streams", "prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", "stream_options")


def _with_gap(model: ServedModel, prompt: str | list[int], suffix: str) -> str:
    if not isinstance(prompt, str):
        raise ApiError(400, "with a suffix the prompt must be a text", "prompt")
    return model.fill_in_middle(prompt, suffix)


def _mean_logprob(completion: Completion) -> float:
    logprobs = completion.logprobs or []
    return sum(x.logprob for x in logprobs) / max(1, len(logprobs))
