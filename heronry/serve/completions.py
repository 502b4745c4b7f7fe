"""POST /v1/completions: texts and token ids continued, with echo and log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..engine.completion import Completion, Pieces, TokenLogprob
from ..engine.sampling import Sampling
from .bodies import SamplingBody, Texts, split_texts
from .errors import ApiError
from .generation import Generation, merge
from .models import ServedModel
from .server import Server, new_id, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import TokenNames, columns

router = APIRouter()
PLAIN = Sampling()  # temperature 1 and no cut, as OpenAI's users and lm-evaluation-harness expect


class CompletionBody(SamplingBody):
    prompt: Texts
    max_tokens: int | None = Field(16, ge=0, le=1 << 30)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=1024)
    add_special_tokens: bool | None = Field(None, description="begin with the tokens that the model's texts begin with")
    return_tokens_as_token_ids: bool | None = None


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continues texts, or lists of token ids."""
    server = server_of(request)
    call = _Call(server, server.models.find(body.model), body, owner_of(request))
    await call.submit()
    if body.stream:
        return await stream_events(call.stream())
    return JSONResponse(await while_connected(request, call.answer()))


class _Call:
    """All prompts of one request, each with n completions; a choice's index is i * n + k."""

    def __init__(self, server: Server, model: ServedModel, body: CompletionBody, owner: str):
        self.body, self.model = body, model
        self.n, self.rows = body.n or 1, body.best_of or body.n or 1
        _check(body, self.n)
        tokenizer = model.speaker.tokenizer
        self.names = TokenNames(tokenizer, bool(body.return_tokens_as_token_ids))
        prompts = split_texts(body.prompt, "prompt")
        self.encoded = [model.speaker.encode(prompt, begins=bool(body.add_special_tokens)) for prompt in prompts]
        self.texts = [x if isinstance(x, str) else tokenizer.decode(x) for x in prompts]
        top = body.logprobs if self.rows == self.n else body.logprobs or 0
        max_tokens = server.most_tokens if body.max_tokens is None else body.max_tokens
        decoding = body.decoding(model, max_tokens, PLAIN, top, self.rows)
        self.generations = [
            Generation(
                server,
                model,
                ids,
                text,
                decoding,
                stops=body.stops,
                prompt_logprobs=body.logprobs if body.echo else None,
                owner=owner,
            )
            for ids, text in zip(self.encoded, self.texts, strict=True)
        ]
        self.head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }

    async def submit(self) -> None:
        """All prompts or none."""
        try:
            await asyncio.gather(*(generation.submit() for generation in self.generations))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for generation in self.generations:
            generation.cancel()

    async def answer(self) -> dict[str, Any]:
        try:
            found = await asyncio.gather(*map(_collect, self.generations))
        finally:
            self.cancel()
        written = sum(x.usage.completion_tokens for completions in found for x in completions)
        choices = []
        for i, completions in enumerate(found):
            best = sorted(completions, key=_mean_logprob, reverse=True)[: self.n]
            for k, completion in enumerate(best if self.rows > self.n else completions):
                choices.append(_Choice(self, i, i * self.n + k).part(completion))
        return self.head | {"choices": choices, "usage": self._usage(written)}

    async def stream(self) -> AsyncGenerator[str, None]:
        parts: dict[int, _Choice] = {}
        written = 0
        usage = {"usage": None} if self.body.include_usage else {}
        try:
            async for i, piece in merge([generation.pieces() for generation in self.generations]):
                index = i * self.n + piece.choice
                part = parts.setdefault(index, _Choice(self, i, index)).part(piece)
                if piece.finish_reason is not None:
                    written += piece.usage.completion_tokens
                yield event(self.head | {"choices": [part]} | usage)
            if self.body.include_usage:
                yield event(self.head | {"choices": [], "usage": self._usage(written)})
        finally:
            self.cancel()

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
            entries = [call.encoded[self.prompt][0], *generation.prompt_logprobs, *entries]
        elif not self.begun:
            self.offset = len(call.texts[self.prompt])
        self.begun = True
        logprobs = None
        if body.logprobs is not None:
            logprobs, self.offset = columns(call.names, entries, self.offset)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _check(body: CompletionBody, n: int) -> None:
    """ApiError for fields that contradict each other."""
    if body.best_of is not None and body.best_of < n:
        raise ApiError(400, f"best_of must be at least n, which is {n}", "best_of")
    if body.best_of is not None and body.best_of > n and body.stream:
        raise ApiError(400, "best_of cannot be streamed: which is best shows at the end", "best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams", "stream_options")


async def _collect(generation: Generation) -> list[Completion]:
    rows: dict[int, Pieces] = {}
    async for piece in generation.pieces():
        rows.setdefault(piece.choice, Pieces()).add(piece)
    return [rows[i].joined() for i in sorted(rows)]


def _mean_logprob(completion: Completion) -> float:
    logprobs = completion.logprobs or []
    return sum(x.logprob for x in logprobs) / max(1, len(logprobs))
