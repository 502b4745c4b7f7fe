"""The routes of llama.cpp's server: POST /completion and /infill, GET /props and /slots, POST /apply-template."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from .. import __version__
from ..engine.answer_state import AnswerState
from ..engine.completion import Completion, TokenLogprob
from ..engine.constraints import Grammar
from ..engine.options import Decoding, resolve
from ..engine.sampling import Sampling
from ..text.chat_templates import FIM_STOPS, render
from ..text.template_choice import in_jinja
from ..text.tokenizers import bytes_of
from .bodies import DialectBody, Stops, listed, refuse
from .errors import ApiError
from .generation import Generation, cancel_all, collect_all, merge, submit_all
from .llama_slots import Slot, check_number, find_slot, keep_slot
from .models import ServedModel
from .reading import read_ending
from .server import Server, owner_of, server_of
from .stream import event, stream_events, while_connected
from .tokens import END_OF_TEXT, finite

router = APIRouter()
# What is cut off is decided before the temperature, as there; penalties do not fade.
USUAL = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, penalty_decay=1, order="top-p-first")
ANY_SEED = (-1, 2**32 - 1)
Mixed = list[int | str]  # token ids and texts between them


class SlotBody(DialectBody):
    """The fields of /completion but for the prompt. Other ways of drawing tokens (DRY, Mirostat, ...) are ignored."""

    model: str | None = None
    n_predict: int = Field(-1, ge=-1, le=1 << 30, description="-1: as many as the server allows")
    temperature: float = Field(USUAL.temperature, ge=0, le=1e6)
    top_k: int = Field(USUAL.top_k, ge=-1, le=1 << 30, description="0 or -1: off")
    top_p: float = Field(USUAL.top_p, ge=0, le=1)
    min_p: float = Field(USUAL.min_p, ge=0, le=1)
    repeat_penalty: float = Field(1.0, gt=0, le=1e6)
    repeat_last_n: int = Field(64, ge=-1, description="0 turns repeat_penalty off; else all tokens count")
    presence_penalty: float = Field(0.0, ge=-1e6, le=1e6)
    frequency_penalty: float = Field(0.0, ge=-1e6, le=1e6)
    seed: int = Field(-1, ge=-1, lt=2**64, description="-1 or 4294967295: another one each time")
    stop: Stops = None
    ignore_eos: bool = False
    logit_bias: dict[str, float | Literal[False]] | list[tuple[int | str, float | Literal[False]]] | None = None
    n_probs: int = Field(0, ge=0, le=100)
    post_sampling_probs: Annotated[bool, refuse("probabilities are those of the model, before sampling")] = False
    grammar: str | None = Field(None, description="GBNF or Lark")
    json_schema: dict[str, Any] | None = None
    stream: bool = False
    return_tokens: bool = False
    cache_prompt: bool = Field(True, description="false: a slot's state is not gone on from")
    id_slot: int = Field(-1, description="the slot that is gone on from and then holds the state; -1: none")


class CompletionBody(SlotBody):
    prompt: str | list[int | str | Mixed]


class ExtraFile(DialectBody):
    text: str


class InfillBody(SlotBody):
    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] = Field([])
    prompt: str = ""


class MessagesBody(DialectBody):
    model: str | None = None
    messages: list[dict[str, Any]]


def error_shape(error: ApiError) -> dict[str, Any]:
    message = f"{error.param}: {error.message}" if error.param else error.message
    return {"error": {"code": error.status, "message": message, "type": error.type}}


@router.post("/completion")
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continues a text, a list of token ids and texts, or several of them."""
    server = server_of(request)
    model = server.models.find(body.model)
    encoded = [_encode(model, prompt) for prompt in _split(body.prompt)]
    return await _reply(server, model, body, encoded, listed(body.stop), request)


@router.post("/infill")
async def infill(body: InfillBody, request: Request) -> Response:
    """Writes what comes between two texts."""
    server = server_of(request)
    model = server.models.find(body.model)
    extra = "".join(f"{file.text}\n" for file in body.input_extra)
    text = model.fill_in_middle(extra + body.input_prefix + body.prompt, body.input_suffix)
    ids = model.speaker.encode(text, begins=True)
    stops = (*FIM_STOPS, *listed(body.stop))
    return await _reply(server, model, body, [ids], stops, request)


@router.get("/props")
async def props(request: Request) -> dict[str, Any]:
    server = server_of(request)
    model = server.models.find(None)
    ends = END_OF_TEXT if model.speaker.tokenizer.stop_ids else ""
    body = SlotBody.model_validate({})
    settings = _settings(body, _decode(body, model, server), ())
    return {
        "default_generation_settings": _slot(0, False, server) | {"params": settings},
        "total_slots": server.scheduler.limits.rows,
        "model_alias": model.name,
        "model_path": model.path,
        "chat_template": in_jinja(model.template),
        "modalities": {"vision": False, "audio": False},
        "bos_token": "",
        "eos_token": ends,
        "build_info": f"heronry-{__version__}",
    }


@router.get("/slots")
async def slots(request: Request, fail_on_no_slot: bool = False) -> list[dict[str, Any]]:
    """One for each sequence that can be written at a time."""
    server = server_of(request)
    total, busy = server.scheduler.limits.rows, server.scheduler.totals.decoding
    if fail_on_no_slot and busy >= total:
        raise ApiError(503, "no slot is free")
    return [_slot(i, i < busy, server) for i in range(total)]


@router.post("/apply-template")
async def apply_template(body: MessagesBody, request: Request) -> dict[str, str]:
    """The prompt that a list of messages makes."""
    return {"prompt": render(body.messages, server_of(request).models.find(body.model).template)}


def _split(prompt: str | list[int | str | Mixed]) -> list[Mixed]:
    """The prompts of a request: a list with an id in it is one."""
    if isinstance(prompt, str):
        return [[prompt]]
    parts = [part for part in prompt if not isinstance(part, list)]
    if any(isinstance(part, int) for part in parts):
        if len(parts) < len(prompt):
            raise ApiError(400, "a list of token ids and texts has no lists in it", "prompt")
        return [parts]
    return [part if isinstance(part, list) else [part] for part in prompt]


def _encode(model: ServedModel, parts: Mixed) -> list[int]:
    """A text at the beginning has the tokens that the model's texts begin with in front."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        ids += model.speaker.encode(part if isinstance(part, str) else [part], begins=i == 0)
    return ids


def _slot(number: int, is_busy: bool, server: Server) -> dict[str, Any]:
    context = server.scheduler.limits.tokens  # of a prompt: nothing else is limited
    return {"id": number, "n_ctx": context, "speculative": False, "is_processing": is_busy}


def _decode(body: SlotBody, model: ServedModel, server: Server) -> Decoding:
    """What the fields of a body say of drawing tokens."""
    given: dict[str, Any] = {
        "temperature": body.temperature,
        "top_k": max(0, body.top_k),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repeat_penalty if body.repeat_last_n else 1.0,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": _bias(body, model),
        "ignore_eos": body.ignore_eos,
    }
    if body.grammar and body.json_schema is not None:
        raise ApiError(400, "give a grammar or a json_schema, not both", "json_schema")
    if body.grammar:
        given["grammar"] = Grammar.from_text(body.grammar)
    elif body.json_schema is not None:
        given["grammar"] = Grammar.from_schema(body.json_schema)
    if body.seed not in ANY_SEED:
        given["seed"] = body.seed
    if body.n_probs:
        given |= {"logprobs": True, "top_logprobs": body.n_probs}
    most = server.most_tokens if body.n_predict < 0 else body.n_predict
    return resolve(given, most, USUAL, model.speaker.model.config.vocab_size, 1)


def _bias(body: SlotBody, model: ServedModel) -> dict[int, float]:
    """Token id -> what is added; a text stands for each of its tokens, False bans."""
    pairs = body.logit_bias.items() if isinstance(body.logit_bias, dict) else body.logit_bias or ()
    bias: dict[int, float] = {}
    for key, value in pairs:
        is_id = isinstance(key, int) or (isinstance(body.logit_bias, dict) and key.isascii() and key.isdigit())
        tokens = [int(key)] if is_id else model.speaker.tokenizer.encode(str(key))
        for token in tokens:
            bias[token] = float("-inf") if value is False else value
    return bias


def _settings(body: SlotBody, decoding: Decoding, stops: tuple[str, ...]) -> dict[str, Any]:
    """generation_settings: what was made of the fields of a body."""
    sampling = decoding.samplings[0]
    return {
        "n_predict": body.n_predict,
        "max_tokens": decoding.max_tokens,
        "seed": body.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": body.repeat_last_n,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(stops),
        "ignore_eos": body.ignore_eos,
        "n_probs": body.n_probs,
        "grammar": body.grammar or "",
        "stream": body.stream,
        "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
    }


class _Call:
    """One request, with one completion for each of its prompts."""

    def __init__(
        self,
        server: Server,
        model: ServedModel,
        body: SlotBody,
        encoded: list[list[int]],
        stops: tuple[str, ...],
        owner: str,
        slot: Slot | None,
    ):
        """slot: what the one prompt begins with."""
        self.server, self.model, self.body, self.owner = server, model, body, owner
        decoding = _decode(body, model, server)
        self.settings = _settings(body, decoding, stops)
        decode = model.speaker.tokenizer.decode
        self.prompts = [decode(ids) for ids in encoded]
        self.known, begin = 0, None
        if slot is not None:
            begin, self.known, before = slot.state, slot.n_tokens, slot.state.texts[0]
            encoded = [model.speaker.encode(self.prompts[0].removeprefix(before), begins=False)]
        self.counts = [self.known + len(ids) for ids in encoded]
        self.ends = [AnswerState(self.prompts[0], self.counts[0])] if body.id_slot >= 0 else []
        self.generations = [
            Generation(server, model, ids, text, decoding, stops=stops, owner=owner, begin=begin, keep=self.ends)
            for ids, text in zip(encoded, self.prompts, strict=True)
        ]

    async def answer(self) -> list[dict[str, Any]]:
        found = await collect_all(self.generations)
        await self._keep_slot()
        return [self._end(i, whole, whole.text, self._probabilities(whole)) for i, [whole] in enumerate(found)]

    async def stream(self) -> AsyncGenerator[str, None]:
        try:
            async for i, piece in merge([generation.pieces() for generation in self.generations]):
                if piece.text or piece.finish_reason is None:
                    yield event(self._part(i, piece))
                if piece.finish_reason is not None:
                    await self._keep_slot()
                    yield event(self._end(i, piece, "", {}))
        finally:
            cancel_all(self.generations)

    async def _keep_slot(self) -> None:
        """Before the client hears that it has ended."""
        for end in self.ends:
            assert end.ending is not None
            slot = Slot(*await read_ending(self.server, self.model, end.ending, self.owner))
            await keep_slot(self.server, self.model, self.owner, self.body.id_slot, slot)

    def _part(self, i: int, piece: Completion) -> dict[str, Any]:
        counts = {"tokens_predicted": piece.usage.completion_tokens, "tokens_evaluated": self.counts[i]}
        text = {"index": i, "content": piece.text, "tokens": piece.token_ids, "stop": False}
        text["id_slot"] = self.body.id_slot
        return text | counts | self._probabilities(piece)

    def _end(self, i: int, piece: Completion, text: str, probabilities: dict[str, Any]) -> dict[str, Any]:
        """The reply to one prompt. piece: the completion, or the last piece of it."""
        generation, tokens = self.generations[i], self.counts[i]
        cached = self.known + generation.cached_tokens
        word = generation.stopped_by.get(piece.choice)
        stop_type = "limit" if piece.finish_reason == "length" else "word" if isinstance(word, str) else "eos"
        return {
            "index": i,
            "content": text,
            "tokens": piece.token_ids if self.body.return_tokens and not self.body.stream else [],
            "id_slot": self.body.id_slot,
            "stop": True,
            "model": self.model.name,
            "tokens_predicted": piece.usage.completion_tokens,
            "tokens_evaluated": tokens,
            "tokens_cached": cached,
            "generation_settings": self.settings,
            "prompt": self.prompts[i],
            "truncated": False,
            "stop_type": stop_type,
            "stopping_word": word if isinstance(word, str) else "",
            "timings": _timings(generation, cached, tokens, piece.usage.completion_tokens),
        } | probabilities

    def _probabilities(self, piece: Completion) -> dict[str, Any]:
        if piece.logprobs is None:
            return {}
        return {"completion_probabilities": [self._entry(entry) for entry in piece.logprobs]}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in entry.top_logprobs.items()]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        tokenizer = self.model.speaker.tokenizer
        text, spelt = tokenizer.decode([token]), list(bytes_of(tokenizer, token))
        return {"id": token, "token": text, "bytes": spelt, "logprob": finite(logprob)}


def _timings(generation: Generation, cached: int, read: int, written: int) -> dict[str, float]:
    """How long it took; to the end of the prompt counts from the request on, with what it waited."""
    seconds = {"prompt": generation.read - generation.begun, "predicted": generation.latest - generation.read}
    found: dict[str, float] = {"cache_n": cached}
    for name, n in (("prompt", read - cached), ("predicted", written)):
        ms = 1000 * max(seconds[name], 1e-6)
        found |= {f"{name}_n": n, f"{name}_ms": ms, f"{name}_per_token_ms": ms / max(1, n)}
        found[f"{name}_per_second"] = 1000 * n / ms
    return found


async def _reply(
    server: Server,
    model: ServedModel,
    body: SlotBody,
    encoded: list[list[int]],
    stops: tuple[str, ...],
    request: Request,
) -> Response:
    if not encoded or not all(encoded):
        raise ApiError(400, "the prompt is empty", "prompt")
    owner, slot = owner_of(request), None
    if body.id_slot >= 0:
        check_number(server, body.id_slot, "id_slot")
        if len(encoded) > 1:
            raise ApiError(400, "several prompts cannot share a slot", "id_slot")
        slot = await find_slot(server, model, owner, body.id_slot) if body.cache_prompt else None
        text = model.speaker.tokenizer.decode(encoded[0])
        if slot is not None and not (text.startswith(slot.state.texts[0]) and text != slot.state.texts[0]):
            slot = None
    call = _Call(server, model, body, encoded, stops, owner, slot)
    await submit_all(call.generations)
    if body.stream:
        return await stream_events(call.stream(), "", error_shape)
    found = await while_connected(request, call.answer())
    return JSONResponse(found if len(found) > 1 else found[0])
