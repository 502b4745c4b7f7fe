"""The routes of Ai00: models, completions and choices under /api/oai, and how its clients get in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, AliasChoices, Field

from ..engine.options import Decoding, resolve
from ..engine.sampling import Sampling
from .bodies import DialectBody, Stops, listed, refuse
from .errors import ApiError
from .gate import find_owner
from .generation import Generation, collect_all, submit_all
from .models import ServedModel
from .server import owner_of, server_of
from .stream import event, stream_events, while_connected

router = APIRouter()
# It cuts off before it tempers.
USUAL = Sampling(
    top_p=0.5, top_k=128, presence_penalty=0.3, frequency_penalty=0.3, penalty_decay=0.99654026, order="top-p-first"
)
NO_STATE = "00000000-0000-0000-0000-000000000000"


def _no_state(state: object) -> object:
    if state not in (None, "", NO_STATE):
        raise ValueError("states are not served here")
    return state


StateField = Annotated[Any, AfterValidator(_no_state)]


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


class CompletionBody(DialectBody):
    model: str | None = None
    prompt: str | list[str] = Field("", description="the parts of a list are joined")
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
    server = server_of(request)
    model = server.models.find(body.model)
    text = _join(body.prompt)
    ids = _begin(model, text)
    stops, owner = listed(body.stop), owner_of(request)
    generation = Generation(server, model, ids, text, body.decoding(model), stops=stops, owner=owner)
    await generation.submit()
    if body.stream:
        return await stream_events(_stream(generation, model, len(ids)), error_shape=error_shape)
    [[found]] = await while_connected(request, collect_all([generation]))
    choice = {"text": found.text, "index": 0, "finish_reason": found.finish_reason}
    usage = _usage(generation, len(ids), found.usage.completion_tokens)
    return JSONResponse({"object": "text_completion", "model": model.path, "choices": [choice], "usage": usage})


async def _stream(generation: Generation, model: ServedModel, read: int) -> AsyncGenerator[str, None]:
    head = {"object": "text_completion.chunk", "model": model.path}
    async for piece in generation.pieces():
        if piece.text:
            yield event(head | {"choices": [{"delta": {"content": piece.text}, "index": 0, "finish_reason": None}]})
        if piece.finish_reason is not None:
            choice = {"delta": {}, "index": 0, "finish_reason": piece.finish_reason}
            usage = _usage(generation, read, piece.usage.completion_tokens)
            yield event(head | {"choices": [choice], "usage": usage})


@router.post("/api/oai/chooses")
@router.post("/api/oai/v1/chooses")
async def choose(body: ChoosesBody, request: Request) -> dict[str, Any]:
    """Ranks texts by how likely they follow another one."""
    server = server_of(request)
    model = server.models.find(body.model)
    encode, size = model.speaker.tokenizer.encode, model.speaker.model.config.vocab_size
    choices = [encode(choice) for choice in body.choices]
    if not choices or not all(choices):
        raise ApiError(400, "give texts to choose from, none of them empty", "choices")
    before = [_begin(model, _join(body.input))] + ([_begin(model, "")] if body.calibrate else [])
    if not all(before):
        raise ApiError(400, "the input is empty", "input")
    nothing = resolve({}, 0, USUAL, size, 1)
    generations = [
        Generation(server, model, [*ids, *choice], "", nothing, prompt_logprobs=0, owner=owner_of(request))
        for ids in before
        for choice in choices
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


def _usage(generation: Generation, read: int, written: int) -> dict[str, Any]:
    nanoseconds = round(1e9 * (generation.latest - generation.read))
    duration = dict(zip(("secs", "nanos"), divmod(nanoseconds, 10**9), strict=True))
    return {"prompt": read, "completion": written, "total": read + written, "duration": duration}
