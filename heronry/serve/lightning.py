"""The routes of rwkv_lightning, in C++ and in Python: many prompts at once, translations, code with a gap, counts.

Its texts are raw: nothing is put in front of them, and no template around them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from ..engine.completion import Completion
from ..engine.options import resolve
from ..engine.presets import PRESETS
from ..text.chat_templates import FIM_STOPS, render
from .bodies import DialectBody, refuse
from .errors import ApiError
from .gate import find_owner
from .generation import Generation, cancel_all, collect_all, merge, submit_all
from .models import ServedModel
from .server import Server, owner_of, server_of
from .stream import event, stream_events, while_connected

USUAL = PRESETS["lightning"]
ITS_MODEL = "rwkv7"  # what its clients call the one model of a server
MOST_TRANSLATED = 2048  # tokens of a text
LANGUAGES = {
    "auto": "English",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "ru": "Russian",
    "zh-CN": "Chinese",
    "zh-TW": "Chinese",
}


async def _identify(request: Request) -> None:
    """The key may stand in the body, as a password."""
    if request.state.owner is not None:
        return
    try:
        body = await request.json()
    except ValueError:
        body = None
    password = body.get("password") if isinstance(body, dict) else None
    try:
        request.state.owner = find_owner(server_of(request).keys, password if isinstance(password, str) else "")
    except ApiError as error:
        raise ApiError(401, "Unauthorized: invalid or missing password", code=error.code) from error


router = APIRouter(dependencies=[Depends(_identify)])


class ModelBody(DialectBody):
    model: str | None = None
    password: str | None = Field(None, description="in place of a key in the headers")
    state_id: Annotated[str | None, refuse("uploaded states are not served here")] = None
    adapter_id: Annotated[str | None, refuse("name the adapter as the model")] = None


class BatchBody(ModelBody):
    max_tokens: int = Field(8192, ge=0, le=1 << 30)
    temperature: float = Field(USUAL.temperature, ge=0, le=1e6)
    top_k: int = Field(USUAL.top_k, ge=-1, le=1 << 30, description="0 or -1: off")
    top_p: float = Field(USUAL.top_p, ge=0, le=1)
    alpha_presence: float = Field(USUAL.presence_penalty, ge=-1e6, le=1e6)
    alpha_frequency: float = Field(USUAL.frequency_penalty, ge=-1e6, le=1e6)
    alpha_decay: float = Field(USUAL.penalty_decay, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop_tokens: list[int | str] | None = Field(None, description="token ids and texts; none: the template's texts")
    stream: bool = False
    chunk_size: int = Field(8, ge=1, description="tokens of an event")


class CompletionsBody(BatchBody):
    contents: list[str]


class MiddleBody(BatchBody):
    prefix: list[str]
    suffix: list[str]


class TranslateBody(ModelBody):
    source_lang: str = "auto"
    target_lang: str
    text_list: list[str]


class CountBody(ModelBody):
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    contents: list[str] | None = None


def error_shape(error: ApiError) -> dict[str, Any]:
    return {"error": f"{error.param}: {error.message}" if error.param else error.message} | error.details


@router.post("/v1/batch/completions")
async def batch_completions(body: CompletionsBody, request: Request) -> Response:
    """Continues many texts."""
    return await _complete(body, request, body.stream)


@router.post("/big_batch/completions")
async def big_batch_completions(body: CompletionsBody, request: Request) -> Response:
    """The same, always as a stream."""
    return await _complete(body, request, True)


async def _complete(body: CompletionsBody, request: Request, stream: bool) -> Response:
    model = _find_model(request, body)
    stops = [stop for stop in body.stop_tokens or () if isinstance(stop, str)]
    if body.stop_tokens is None:
        stops = list(model.template.stops)
    return await _reply(_Batch(model, body.contents, stops, body, request), "chat.completion", stream)


@router.post("/FIM/v1/batch-FIM")
async def batch_middle(body: MiddleBody, request: Request) -> Response:
    """Writes what comes between many pairs of texts."""
    model = _find_model(request, body)
    if len(body.prefix) != len(body.suffix):
        raise ApiError(400, f"there are {len(body.prefix)} prefixes and {len(body.suffix)} suffixes", "suffix")
    prompts = [model.fill_in_middle(*pair) for pair in zip(body.prefix, body.suffix, strict=True)]
    stops = [*FIM_STOPS, *(stop for stop in body.stop_tokens or () if isinstance(stop, str))]
    return await _reply(_Batch(model, prompts, stops, body, request), "FIM.completion", body.stream)


@router.post("/translate/v1/batch-translate")
async def batch_translate(body: TranslateBody, request: Request) -> dict[str, Any]:
    """Translates many texts."""
    source, target = (LANGUAGES.get(name, name) for name in (body.source_lang, body.target_lang))
    prompts = [f"{source}: {text}\n\n{target}:" for text in body.text_list]
    greedy = {"max_tokens": MOST_TRANSLATED, "temperature": 0, "alpha_presence": 0, "alpha_frequency": 0}
    batch = _Batch(_find_model(request, body), prompts, (), BatchBody.model_validate(greedy), request)
    await submit_all(batch.generations)
    found = await while_connected(request, batch.completions())
    name = body.source_lang if body.source_lang != "auto" else "en"
    translations = [{"detected_source_lang": name, "text": x.text} for x in found]
    return {"translations": translations, "usage": batch.usage(sum(x.usage.completion_tokens for x in found))}


@router.post("/v1/tokens/count")
async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    """The number of tokens of a text, of all contents together, or of the prompt that messages make."""
    model = _find_model(request, body)
    if body.text is not None:
        texts = [body.text]
    elif body.messages is not None:
        texts = [render(body.messages, model.template)]
    elif body.contents is not None:
        texts = body.contents
    else:
        raise ApiError(400, "Missing text or messages")
    return {"tokens": sum(len(model.speaker.tokenizer.encode(text)) for text in texts)}


@router.get("/v1/server/status")
async def status(request: Request) -> dict[str, Any]:
    server = server_of(request)
    totals = server.scheduler.totals
    return {
        "status": "running" if server.scheduler.is_alive() else "stopped",
        "dynamic_loading": False,
        "model": {"id": server.models.find(None).name, "loaded": True},
        "waiting": totals.waiting,
        "reading": totals.reading,
        "decoding": totals.decoding,
    }


def _find_model(request: Request, body: ModelBody) -> ServedModel:
    models = server_of(request).models
    is_its = body.model == ITS_MODEL and ITS_MODEL not in models.by_name
    return models.find(None if is_its else body.model)


class _Batch:
    """One completion for each of many prompts."""

    def __init__(
        self, model: ServedModel, prompts: Sequence[str], stops: Sequence[str], body: BatchBody, request: Request
    ):
        server: Server = server_of(request)
        most = server.scheduler.limits.waiting
        if not prompts:
            raise ApiError(400, "Empty prompts list")
        if len(prompts) > most:
            error = ApiError(400, f"bsz overflow, Max bsz={most}")
            error.details |= {"request_bsz": len(prompts), "max_bsz": most}
            raise error
        self.model, self.body, self.request = model, body, request
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

        self.generations: list[Generation] = []
        for i, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            seed = {} if body.seed is None else {"seed": (body.seed + i) % 2**64}
            decoding = resolve(options | seed, body.max_tokens, USUAL, size, 1)
            self.generations.append(Generation(server, model, ids, prompt, decoding, stops=stops, owner=owner))

    async def completions(self) -> list[Completion]:
        return [whole for [whole] in await collect_all(self.generations)]

    async def answer(self, kind: str) -> dict[str, Any]:
        found = await self.completions()
        choices = [
            {"index": i, "message": {"role": "assistant", "content": x.text}, "finish_reason": x.finish_reason}
            for i, x in enumerate(found)
        ]
        usage = self.usage(sum(x.usage.completion_tokens for x in found))
        head = {"id": "rwkv7-fast-batch", "object": kind, "model": self.model.name}
        return head | {"choices": choices, "usage": usage}

    async def stream(self) -> AsyncGenerator[str, None]:
        texts = [""] * len(self.generations)
        sent = [0] * len(self.generations)  # tokens
        written, left = 0, len(self.generations)
        try:
            async for i, piece in merge([generation.pieces() for generation in self.generations]):
                texts[i] += piece.text
                count, reason = piece.usage.completion_tokens, piece.finish_reason
                if texts[i] and (count - sent[i] >= self.body.chunk_size or reason is not None):
                    yield _chunk(i, {"content": texts[i]})
                    texts[i], sent[i] = "", count
                if reason is not None:
                    written, left = written + count, left - 1
                    end = {"finish_reason": reason}
                    yield _chunk(i, {}, end, {} if left else {"usage": self.usage(written)})
        finally:
            cancel_all(self.generations)

    def usage(self, written: int) -> dict[str, int]:
        return {"prompt_tokens": self.read, "completion_tokens": written, "total_tokens": self.read + written}


def _chunk(i: int, delta: dict[str, str], end: dict[str, Any] | None = None, more: dict[str, Any] | None = None) -> str:
    choice = {"index": i, "delta": delta} | (end or {})
    return event({"object": "chat.completion.chunk", "choices": [choice]} | (more or {}))


async def _reply(batch: _Batch, kind: str, stream: bool) -> Response:
    await submit_all(batch.generations)
    if stream:
        return await stream_events(batch.stream(), error_shape=error_shape)
    return JSONResponse(await while_connected(batch.request, batch.answer(kind)))
