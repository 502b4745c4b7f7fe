"""The routes of rwkv_lightning, in C++ and in Python: many prompts at once, translations, code with a gap, counts.

Its texts are raw: nothing is put in front of them, and no template around them. Its sessions are in
lightning_sessions.py, its uploaded states in lightning_states.py, adapters in adapters.py, and what it adds to OpenAI's
chat in lightning_chat.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from ..text.chat_templates import FIM_STOPS, render
from .errors import ApiError
from .generation import submit_all
from .lightning_batch import Batch, text_stops
from .lightning_bodies import (
    BatchBody,
    CompletionsBody,
    ModelBody,
    find_model,
    identify,
    uploaded_state,
)
from .server import server_of
from .stream import while_connected

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
router = APIRouter(dependencies=[Depends(identify)])


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


@router.post("/v1/batch/completions")
async def batch_completions(body: CompletionsBody, request: Request) -> Response:
    """Continues many texts."""
    return await (await _continue(body, request)).reply("rwkv7-fast-batch")


@router.post("/v2/chat/completions")
async def chat_completions_of_raw_texts(body: CompletionsBody, request: Request) -> Response:
    """The same by another name."""
    return await (await _continue(body, request)).reply("rwkv7-batch-v2")


@router.post("/big_batch/completions")
async def big_batch_completions(body: CompletionsBody, request: Request) -> Response:
    """The same, always as a stream."""
    return await (await _continue(body, request)).reply("rwkv7-fast-batch", stream=True)


async def _continue(body: CompletionsBody, request: Request) -> Batch:
    model = find_model(request, body)
    begin = await uploaded_state(request, model, body)
    return Batch(model, body.contents, text_stops(model, body), body, request, begin)


@router.post("/FIM/v1/batch-FIM")
async def batch_middle(body: MiddleBody, request: Request) -> Response:
    """Writes what comes between many pairs of texts."""
    model = find_model(request, body)
    if len(body.prefix) != len(body.suffix):
        raise ApiError(400, f"there are {len(body.prefix)} prefixes and {len(body.suffix)} suffixes", "suffix")
    prompts = [model.fill_in_middle(*pair) for pair in zip(body.prefix, body.suffix, strict=True)]
    stops = [*FIM_STOPS, *(stop for stop in body.stop_tokens or () if isinstance(stop, str))]
    batch = Batch(model, prompts, stops, body, request, await uploaded_state(request, model, body))
    return await batch.reply("rwkv7-fast-batch", "FIM.completion")


@router.post("/translate/v1/batch-translate")
async def batch_translate(body: TranslateBody, request: Request) -> dict[str, Any]:
    """Translates many texts."""
    source, target = (LANGUAGES.get(name, name) for name in (body.source_lang, body.target_lang))
    prompts = [f"{source}: {text}\n\n{target}:" for text in body.text_list]
    greedy = {"max_tokens": MOST_TRANSLATED, "temperature": 0, "alpha_presence": 0, "alpha_frequency": 0}
    model = find_model(request, body)
    begin = await uploaded_state(request, model, body)
    batch = Batch(model, prompts, (), BatchBody.model_validate(greedy), request, begin)
    await submit_all(batch.generations)
    found = await while_connected(request, batch.completions())
    name = body.source_lang if body.source_lang != "auto" else "en"
    translations = [{"detected_source_lang": name, "text": x.text} for x in found]
    return {"translations": translations, "usage": batch.usage(sum(x.usage.completion_tokens for x in found))}


@router.post("/v1/tokens/count")
async def count_tokens(body: CountBody, request: Request) -> dict[str, int]:
    """The number of tokens of a text, of all contents together, or of the prompt that messages make."""
    model = find_model(request, body)
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
