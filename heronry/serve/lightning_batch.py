"""Many texts continued side by side, in rwkv_lightning's shapes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ..engine.answer_state import AnswerState
from ..engine.completion import Completion
from ..engine.options import resolve
from ..models import State
from .errors import ApiError
from .generation import Generation, cancel_all, collect_all, merge, submit_all
from .lightning_bodies import USUAL, BatchBody, error_shape
from .models import ServedModel
from .server import Server, owner_of, server_of
from .stream import event, stream_events, while_connected


class Batch:
    """One completion for each of many raw texts: nothing is put in front of them.

    states: of each, where they are kept.
    head: of the reply, besides its id and object. first: an event in front of all others of a stream.
    before_end: awaited when the texts are written, before their client hears of it.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: Sequence[str],
        stops: Sequence[str],
        body: BatchBody,
        request: Request,
        begin: State | None = None,
        keep: bool = False,
    ):
        """
        Args:
            stops: texts that end one.
            begin: what each text goes on from.
            keep: follow each to its state, which ends in front of white space.
        """
        server: Server = server_of(request)
        most = server.scheduler.limits.waiting
        if not prompts:
            raise ApiError(400, "Empty prompts list")
        if len(prompts) > most:
            error = ApiError(400, f"bsz overflow, Max bsz={most}")
            error.details |= {"request_bsz": len(prompts), "max_bsz": most}
            raise error
        self.model, self.body, self.request = model, body, request
        self.head: dict[str, Any] = {}
        self.first: dict[str, Any] | None = None
        self.before_end: Callable[[], Awaitable[None]] | None = None
        encoded = [model.speaker.encode(prompt, begins=False) for prompt in prompts]
        self.read = sum(map(len, encoded))
        options = {
            "temperature": body.temperature,
            "top_k": max(0, body.top_k),
            "top_p": body.top_p,
            "presence_penalty": body.alpha_presence,
            "frequency_penalty": body.alpha_frequency,
            "penalty_decay": body.alpha_decay,
            "stop_token_ids": [stop for stop in body.stop_tokens or () if isinstance(stop, int)],
        }
        size, owner = model.speaker.model.config.vocab_size, owner_of(request)
        before = begin.texts[0] if begin is not None else ""
        self.states: list[AnswerState] = []
        self.generations: list[Generation] = []
        for i, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            seed = {} if body.seed is None else {"seed": (body.seed + i) % 2**64}
            decoding = resolve(options | seed, body.max_tokens, USUAL, size, 1)
            kept = [AnswerState(before + prompt, len(ids), strip=True)] if keep else []
            self.states += kept
            self.generations.append(
                Generation(server, model, ids, prompt, decoding, stops=stops, owner=owner, begin=begin, keep=kept)
            )

    async def reply(self, name: str, kind: str = "chat.completion", stream: bool | None = None) -> Response:
        """The reply, with an id and an object. stream: None = as the body says."""
        await submit_all(self.generations)
        if self.body.stream if stream is None else stream:
            return await stream_events(self._stream(), error_shape=error_shape)
        return JSONResponse(await while_connected(self.request, self._answer(name, kind)))

    async def completions(self) -> list[Completion]:
        found = [whole for [whole] in await collect_all(self.generations)]
        if self.before_end is not None:
            await self.before_end()
        return found

    async def _answer(self, name: str, kind: str) -> dict[str, Any]:
        found = await self.completions()
        choices = [
            {"index": i, "message": {"role": "assistant", "content": x.text}, "finish_reason": x.finish_reason}
            for i, x in enumerate(found)
        ]
        usage = self.usage(sum(x.usage.completion_tokens for x in found))
        head = {"id": name, "object": kind, "model": self.model.name}
        return head | {"choices": choices, "usage": usage} | self.head

    async def _stream(self) -> AsyncGenerator[str, None]:
        texts = [""] * len(self.generations)
        sent = [0] * len(self.generations)  # tokens
        written, left = 0, len(self.generations)
        try:
            if self.first is not None:
                yield event(self.first)
            async for i, piece in merge([generation.pieces() for generation in self.generations]):
                texts[i] += piece.text
                count, reason = piece.usage.completion_tokens, piece.finish_reason
                if texts[i] and (count - sent[i] >= self.body.chunk_size or reason is not None):
                    yield _chunk(i, {"content": texts[i]})
                    texts[i], sent[i] = "", count
                if reason is not None:
                    written, left = written + count, left - 1
                    if not left and self.before_end is not None:
                        await self.before_end()
                    end = {"finish_reason": reason}
                    yield _chunk(i, {}, end, {} if left else {"usage": self.usage(written)})
        finally:
            cancel_all(self.generations)

    def usage(self, written: int) -> dict[str, int]:
        return {"prompt_tokens": self.read, "completion_tokens": written, "total_tokens": self.read + written}


def text_stops(model: ServedModel, body: BatchBody) -> list[str]:
    """The texts that end one: those of the body, or where it names no stops at all those of the template."""
    if body.stop_tokens is None:
        return list(model.template.stops)
    return [stop for stop in body.stop_tokens if isinstance(stop, str)]


def _chunk(i: int, delta: dict[str, str], end: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> str:
    choice = {"index": i, "delta": delta} | (end or {})
    return event({"object": "chat.completion.chunk", "choices": [choice]} | (more or {}))
