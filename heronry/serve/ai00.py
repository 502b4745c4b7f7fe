"""The routes of Ai00: models, completions, states, choices and embeddings under /api/oai, and how its clients get in.
Its chat is in ai00_chat.py."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, AliasChoices, Field

from ..engine.options import Decoding, resolve
from ..engine.sampling import Sampling
from . import named_states
from .bodies import DialectBody, Stops, listed, refuse
from .embeddings import MOST_TEXTS, EmbeddingsBody, embed_all
from .errors import ApiError
from .gate import find_owner
from .generation import Generation, collect_all, submit_all
from .models import ServedModel
from .reading import read_tokens
from .server import owner_of, server_of
from .stream import event, stream_events, while_connected

router = APIRouter()
# It cuts off before it tempers.
USUAL = Sampling(
    top_p=0.5, top_k=128, presence_penalty=0.3, frequency_penalty=0.3, penalty_decay=0.99654026, order="top-p-first"
)
NO_STATE = "00000000-0000-0000-0000-000000000000"


def _read_state(state: object) -> str | None:
    if state in (None, "", NO_STATE):
        return None
    if not isinstance(state, str):
        raise ValueError("the id of a state is expected, as /api/oai/states gives; its numbers or a file are not taken")
    return state


StateField = Annotated[Any, AfterValidator(_read_state)]  # an id, or None


class SamplerBody(DialectBody):
    """What is not given is as in `USUAL`."""

    type: Literal["Nucleus"] = "Nucleus"
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    presence_penalty: float | None = Field(None, ge=-1e6, le=1e6)
    frequency_penalty: float | None = Field(None, ge=-1e6, le=1e6)
    penalty_decay: float | None = Field(None, ge=0, le=1)

    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self.model_dump(exclude={"type"}).items() if value is not None}


class WritingBody(DialectBody):
    """How a text is continued."""

    model: str | None = None
    state: StateField = None
    max_tokens: int = Field(256, ge=0, le=1 << 30)
    stop: Stops = "\n\n"
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 30)
    bias: dict[int, float] = Field({}, validation_alias=AliasChoices("bias", "logit_bias"))
    sampler: SamplerBody | None = Field(None, description="comes before the three above")
    sampler_override: SamplerBody | None = Field(None, description="comes before all others")
    bnf_schema: Annotated[str | None, refuse("Ai00's BNF is not served here; /v1/completions takes a grammar")] = None

    def decoding(self, model: ServedModel) -> Decoding:
        """What these fields say."""
        above = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given: dict[str, Any] = {"logit_bias": self.bias}
        for sampler in (SamplerBody.model_validate(above), self.sampler, self.sampler_override):
            given |= sampler.given() if sampler else {}
        return resolve(given, self.max_tokens, USUAL, model.speaker.model.config.vocab_size, 1)


class CompletionBody(WritingBody):
    prompt: str | list[str] = Field("", description="the parts of a list are joined")


class StatesBody(DialectBody):
    model: str | None = None
    input: str | list[str] = Field("", description="the parts of a list are joined")
    state: StateField = None


class EmbedsBody(DialectBody):
    model: str | None = None
    input: str
    max_tokens: int = Field(510, ge=1, le=1 << 20, description="of a part of the text, each of which has a vector")
    prefix: str = Field("query:", description="in front of every part")


class ChoosesBody(DialectBody):
    model: str | None = None
    input: str | list[str] = Field("", description="the parts of a list are joined")
    choices: list[str]
    calibrate: bool = Field(False, description="less what each choice costs by itself")
    state: StateField = None


class AppKeyBody(DialectBody):
    app_id: str
    app_secret: str


def error_shape(error: ApiError) -> dict[str, Any]:
    message = f"{error.param}: {error.message}" if error.param else error.message
    return {"error": {"code": error.status, "name": HTTPStatus(error.status).phrase, "brief": message}}


@router.post("/api/auth/exchange")
async def exchange(body: AppKeyBody, request: Request) -> JSONResponse:
    """A token for the name of a key and the key: the key itself."""
    keys = server_of(request).keys
    code, message = 200, "SUCCESS"
    if not keys:
        code, message = 404, "this server asks for no keys: call it without a token"
    elif not _is_key(keys, body):
        code, message = 403, "NO-Match AppId and SecretKey"
    token = body.app_secret if code == 200 else None
    return JSONResponse({"token": token, "code": code, "message": message}, code)


def _is_key(keys: Mapping[str, str], body: AppKeyBody) -> bool:
    try:
        return find_owner(keys, body.app_secret) == body.app_id
    except ApiError:
        return False


@router.get("/api/oai/models")
@router.get("/api/oai/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"data": [{"object": "models", "id": name} for name in server_of(request).models.by_name]}


@router.get("/api/models/list")
async def list_files(request: Request) -> list[dict[str, Any]]:
    models = server_of(request).models.by_name.values()
    return [
        {"name": x.name, "path": x.path, "size": sum(w.nbytes for w in x.speaker.model.parameters())} for x in models
    ]


@router.get("/api/models/info")
async def info(request: Request) -> dict[str, Any]:
    server = server_of(request)
    model = server.models.find(None)
    network = model.speaker.model
    return {
        "reload": {
            "model_path": model.path,
            "lora": [],
            "state": [],
            "precision": "Fp32" if "float32" in str(network.dtype) else "Fp16",
            "max_batch": server.scheduler.limits.rows,
        },
        "model": {
            "version": f"V{network.name.removeprefix('rwkv')}",
            "num_layer": network.config.n_layer,
            "num_emb": network.config.n_embd,
            "num_vocab": network.config.vocab_size,
        },
        "states": [],
    }


@router.post("/api/oai/completions")
@router.post("/api/oai/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continues a text."""
    model, generation, read = await begin_writing(body, request, _join(body.prompt))
    if body.stream:
        return await stream_events(_stream(generation, model, read), error_shape=error_shape)
    [[found]] = await while_connected(request, collect_all([generation]))
    choice = {"text": found.text, "index": 0, "finish_reason": found.finish_reason}
    usage = describe_usage(generation, read, found.usage.completion_tokens)
    return JSONResponse({"object": "text_completion", "model": model.path, "choices": [choice], "usage": usage})


async def begin_writing(body: WritingBody, request: Request, text: str) -> tuple[ServedModel, Generation, int]:
    """The model, what it writes after a text, and how many tokens the text has."""
    server, owner = server_of(request), owner_of(request)
    model = server.models.find(body.model)
    begin = await named_states.begin_from(server, model, owner, body.state)
    ids = _begin(model, text)
    options: dict[str, Any] = {"stops": listed(body.stop), "owner": owner, "begin": begin and begin.state}
    generation = Generation(server, model, ids, text, body.decoding(model), **options)
    await generation.submit()
    return model, generation, len(ids)


async def _stream(generation: Generation, model: ServedModel, read: int) -> AsyncGenerator[str, None]:
    head = {"object": "text_completion.chunk", "model": model.path}
    async for piece in generation.pieces():
        if piece.text:
            yield event(head | {"choices": [{"delta": {"content": piece.text}, "index": 0, "finish_reason": None}]})
        if piece.finish_reason is not None:
            choice = {"delta": {}, "index": 0, "finish_reason": piece.finish_reason}
            usage = describe_usage(generation, read, piece.usage.completion_tokens)
            yield event(head | {"choices": [choice], "usage": usage})


@router.post("/api/oai/states")
@router.post("/api/oai/v1/states")
async def create_state(body: StatesBody, request: Request) -> dict[str, Any]:
    """Keeps the state after a text. It is known by its id; its numbers are at /v1/states/ID/content."""
    server, owner, began = server_of(request), owner_of(request), time.perf_counter()
    model, text = server.models.find(body.model), _join(body.input)
    begin = await named_states.begin_from(server, model, owner, body.state)
    ids = model.speaker.encode(text, begins=False)
    state = await read_tokens(server, model, ids, begin and begin.state, owner)
    state = state.with_texts([(begin.state.texts[0] if begin else "") + text])
    known = 0 if begin is None else begin.n_tokens
    n_tokens = None if known is None else known + len(ids)
    key = named_states.key_of(owner, str(uuid.uuid4()))
    await named_states.keep(server, key, state, model, n_tokens, "text")
    data = {"object": "states", "index": 0, "id": key.name, "data": [], "shape": [0, 0, 0, 0]}
    usage = _usage(len(ids), 0, time.perf_counter() - began)
    return {"object": "list", "model": model.path, "data": [data], "usage": usage}


@router.post("/api/oai/embeds")
@router.post("/api/oai/v1/embeds")
async def embed(body: EmbedsBody, request: Request) -> dict[str, Any]:
    """Embeds the parts of a text, one after the other."""
    server = server_of(request)
    model = server.models.find(body.model)
    encode, decode = model.speaker.tokenizer.encode, model.speaker.tokenizer.decode
    ids = encode(body.input)
    if not ids:
        raise ApiError(400, "the input is empty", "input")
    parts = split_whole(ids, body.max_tokens, decode)
    if len(parts) > MOST_TEXTS:
        raise ApiError(400, f"the input has {len(parts):,} parts; at most {MOST_TEXTS:,} are embedded at once", "input")
    encoded = [encode(body.prefix) + part for part in parts]
    how = EmbeddingsBody.model_validate({"input": body.input})
    vectors = await while_connected(request, embed_all(server, model, encoded, how, owner_of(request)))
    chunks = [{"chunk": decode(part), "embed": [vector.tolist()]} for part, vector in zip(parts, vectors, strict=True)]
    data = [{"object": "embed", "index": 0, "chunks": chunks}]
    return {"object": "embeds", "model": model.path, "data": data}


def split_whole(ids: list[int], most: int, decode: Callable[[list[int]], str]) -> list[list[int]]:
    """Tokens in parts of at most so many, none of which ends within a character, as far as that goes."""
    parts = []
    while ids:
        end = most
        while end > max(0, most - 4) and end < len(ids) and decode(ids[:end]).endswith("\ufffd"):
            end -= 1
        parts.append(ids[: end or most])
        ids = ids[end or most :]
    return parts


@router.api_route("/admin/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
async def refuse_admin(rest: str) -> None:
    raise ApiError(403, "models are chosen when the server is started: heronry serve --model FILE")


@router.post("/api/oai/chooses")
@router.post("/api/oai/v1/chooses")
async def choose(body: ChoosesBody, request: Request) -> dict[str, Any]:
    """Ranks texts by how likely they follow another one."""
    server = server_of(request)
    model = server.models.find(body.model)
    encode, size = model.speaker.tokenizer.encode, model.speaker.model.config.vocab_size
    begin = await named_states.begin_from(server, model, owner_of(request), body.state)
    choices = [encode(choice) for choice in body.choices]
    if not choices or not all(choices):
        raise ApiError(400, "give texts to choose from, none of them empty", "choices")
    before = [_begin(model, _join(body.input))] + ([_begin(model, "")] if body.calibrate else [])
    if not all(before):
        raise ApiError(400, "the input is empty", "input")
    nothing = resolve({}, 0, USUAL, size, 1)
    options: dict[str, Any] = {"prompt_logprobs": 0, "owner": owner_of(request), "begin": begin and begin.state}
    generations = [
        Generation(server, model, [*ids, *choice], "", nothing, **options) for ids in before for choice in choices
    ]
    await submit_all(generations)
    await while_connected(request, collect_all(generations))
    costs = [
        -sum(entry.logprob for entry in generation.prompt_logprobs[-len(choice) :]) / len(choice)
        for generation, choice in zip(generations, choices * len(before), strict=True)
    ]
    if body.calibrate:
        costs = [cost - alone for cost, alone in zip(costs[: len(choices)], costs[len(choices) :], strict=True)]
    ranked = sorted(range(len(choices)), key=costs.__getitem__)
    data = [
        {"object": "choice", "index": i, "rank": rank, "choice": body.choices[i], "perplexity": costs[i]}
        for rank, i in enumerate(ranked)
    ]
    return {"object": "list", "model": model.path, "data": data}


def _join(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def _begin(model: ServedModel, text: str) -> list[int]:
    """The tokens of a text; of none that of the end of a text, where every text begins."""
    return model.speaker.encode(text, begins=False) or sorted(model.speaker.tokenizer.stop_ids)[:1]


def describe_usage(generation: Generation, read: int, written: int) -> dict[str, Any]:
    return _usage(read, written, generation.latest - generation.read)


def _usage(read: int, written: int, seconds: float) -> dict[str, Any]:
    duration = dict(zip(("secs", "nanos"), divmod(round(1e9 * seconds), 10**9), strict=True))
    return {"prompt": read, "completion": written, "total": read + written, "duration": duration}
