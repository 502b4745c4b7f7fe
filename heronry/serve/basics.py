"""Models, health and tokens: the small routes, in the words of OpenAI, vLLM and llama.cpp."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from .. import __version__
from ..engine.presets import PRESETS
from ..engine.sampling import Sampling
from ..text.tokenizers import bytes_of, spell
from .bodies import SamplingBody
from .errors import ApiError
from .models import ServedModel
from .prompts import AnswerBody, prompt_ids, read_prompt
from .server import server_of
from .tokens import END_OF_TEXT

router = APIRouter()


@router.get("/v1/models")
@router.get("/openai/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    models = server_of(request).models
    return {"object": "list", "data": [model.describe() for model in models.by_name.values()]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, request: Request) -> dict[str, Any]:
    return server_of(request).models.find(name).describe()


@router.get("/v1/presets")
async def list_presets() -> dict[str, Any]:
    """Ways of drawing tokens, by name: `preset` of any request with messages."""
    data = [{"id": name, "object": "preset"} | _fields(sampling) for name, sampling in PRESETS.items()]
    return {"object": "list", "data": data}


def _fields(sampling: Sampling) -> dict[str, Any]:
    """Those that requests have too."""
    names = [name for name in SamplingBody.model_fields if name not in ("seed", "logit_bias")]
    return {name: value for name, value in asdict(sampling).items() if name in names}


@router.get("/health")
@router.get("/v1/health")
@router.get("/ping")
async def health(request: Request) -> dict[str, Any]:
    scheduler = server_of(request).scheduler
    if not scheduler.is_alive():
        raise ApiError(503, "the thread that runs the models has ended")
    totals = scheduler.totals
    return {"status": "ok", "waiting": totals.waiting, "reading": totals.reading, "decoding": totals.decoding}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests that are here, as vLLM tells it."""
    totals = server_of(request).scheduler.totals
    return {"server_load": totals.waiting + totals.reading + totals.decoding}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


class TokenizeBody(BaseModel):
    """vLLM's body has a prompt or messages, llama.cpp's a content: each gets the answer of its own."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    content: str | None = None
    add_special_tokens: bool = False
    add_special: bool = False
    with_pieces: bool = False
    return_token_strs: bool = False


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    model = server_of(request).models.find(body.model)
    text = body.prompt if body.prompt is not None else body.content
    tokenizer = model.speaker.tokenizer
    if text is not None:
        ids = _encode(model, text, body.add_special_tokens or body.add_special)
    elif body.messages is not None:
        ids = prompt_ids(model, read_prompt(model, body.messages, AnswerBody.model_validate({})))
    else:
        raise ApiError(400, "give a prompt or messages (as for vLLM), or a content (as for llama.cpp)", "prompt")
    if body.prompt is None and body.messages is None:
        return {"tokens": [{"id": i, "piece": _piece(model, i)} for i in ids] if body.with_pieces else ids}
    return {
        "count": len(ids),
        "max_model_len": model.context,
        "tokens": ids,
        "token_strs": [spell(tokenizer, i) for i in ids] if body.return_token_strs else None,
    }


def _encode(model: ServedModel, text: str, special: bool) -> list[int]:
    """Token ids of a text; the name of the end of text alone is its id, by which clients look it up."""
    tokenizer = model.speaker.tokenizer
    if text == END_OF_TEXT and tokenizer.stop_ids:
        return sorted(tokenizer.stop_ids)[:1]
    return [*(sorted(tokenizer.stop_ids)[:1] if special else ()), *tokenizer.encode(text)]


def _piece(model: ServedModel, token: int) -> str | list[int]:
    """As llama.cpp has it: a text, or where it is none the bytes."""
    tokenizer = model.speaker.tokenizer
    text = tokenizer.decode([token])
    return list(bytes_of(tokenizer, token)) if "\ufffd" in text else text


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    model = server_of(request).models.find(body.model)
    text = model.speaker.tokenizer.decode(model.speaker.encode(body.tokens, begins=False))
    return {"prompt": text, "content": text}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, response: Response) -> dict[str, Any]:
    model = server_of(request).models.find(None)
    tokenizer = model.speaker.tokenizer
    ends = bool(tokenizer.stop_ids)
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "eos_token": END_OF_TEXT if ends else None,
        "bos_token": None,
        "pad_token": None,
    }
