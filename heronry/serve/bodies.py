"""What the bodies of several routes have in common: texts, and how tokens are drawn."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from ..engine.options import Decoding, resolve
from ..engine.sampling import Sampling
from ..text.utf8 import encode_utf8
from .errors import ApiError
from .grammars import GrammarBody
from .models import ServedModel
from .token_masks import make_mask

MOST_STOPS = 16
Texts = str | list[str] | list[int] | list[list[int]]


def split_texts(texts: Texts, field: str) -> list[str | list[int]]:
    """The texts in a field of a body: a list of ids is one. ApiError where there is none, or an empty one."""
    if isinstance(texts, str):
        found: list[Any] = [texts]
    else:
        found = [texts] if texts and isinstance(texts[0], int) else list(texts)
    if not found or not all(found):
        raise ApiError(400, f"the {field} is empty", field)
    return found


def refuse(reason: str) -> AfterValidator:
    """For a field that would change the answer if it were served: a value that asks for something is refused."""

    def check(value: object) -> object:
        if value:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


def read_stops(stop: str | list[str] | None) -> str | list[str] | None:
    """For a field with stop strings: refuses empty ones, what is no text, and too many."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MOST_STOPS:
        raise ValueError(f"at most {MOST_STOPS} stop strings")
    if "" in stops:
        raise ValueError("a stop string must not be empty")
    for text in stops:
        encode_utf8(text)
    return stop


Stops = Annotated[str | list[str] | None, AfterValidator(read_stops)]


def listed(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


class DialectBody(BaseModel):
    """Of routes that are not OpenAI's: unknown fields are ignored, and null is as if nothing were given."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        return {name: x for name, x in data.items() if x is not None} if isinstance(data, dict) else data


def check_json(data: object) -> object:
    """Refuses what could not be told back or kept: half a character, NaN, nesting without end."""
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON that could be kept: {error}") from None
    return data


class KeptBody(BaseModel):
    """Of routes that keep texts: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: object) -> object:
        return check_json(data) if isinstance(data, dict) else data


class StreamOptions(BaseModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class DrawingBody(BaseModel):
    """How tokens are drawn: what is set for a whole conversation too."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30, description="0 or -1: off")
    presence_penalty: float | None = Field(None, ge=-1e6, le=1e6)
    frequency_penalty: float | None = Field(None, ge=-1e6, le=1e6)
    penalty_decay: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stops = None


class SamplingBody(DrawingBody, GrammarBody):
    """The fields of OpenAI's API, and those that vLLM and others add. Unknown ones are ignored, as vLLM does."""

    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=1e6)
    logit_bias: dict[str, float] | None = Field(None, description="token id -> -100 to 100; -100 bans it")
    n: int | None = Field(None, ge=1, le=1024)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=1 << 30)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not token.isascii() or not token.isdigit():
                raise ValueError(f"its keys are token ids, got {token[:40]!r}")
            if not -100 <= value <= 100:
                raise ValueError(f"the bias of token {token} is not from -100 to 100")
        return bias

    @property
    def stops(self) -> tuple[str, ...]:
        return listed(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def decoding(
        self, model: ServedModel, max_tokens: int, default: Sampling, top_logprobs: int | None, rows: int
    ) -> Decoding:
        """What these fields say, for so many completions of one prompt.

        default: where they say nothing.

        Raises:
            InputError: a value that the engine does not take.
        """
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "penalty_decay")
        given: dict[str, Any] = {
            name: value for name in (*names, "repetition_penalty") if (value := getattr(self, name)) is not None
        }
        if self.top_k is not None:
            given["top_k"] = max(0, self.top_k)
        if self.logit_bias:
            bans = {int(token): float("-inf") if bias == -100 else bias for token, bias in self.logit_bias.items()}
            given["logit_bias"] = bans
        if self.seed is not None:
            given["seed"] = [(self.seed + i) % 2**64 for i in range(rows)]
        for name in ("stop_token_ids", "ignore_eos", "min_tokens"):
            if (value := getattr(self, name)) is not None:
                given[name] = value
        given["grammar"] = self.read_grammar()
        size = model.speaker.model.config.vocab_size
        mask = make_mask(self.allowed_token_ids, self.bad_words, model.speaker.tokenizer, size)
        if mask is not None:
            given["mask"] = mask
        if top_logprobs is not None:
            given |= {"logprobs": True, "top_logprobs": top_logprobs}
        return resolve(given, max_tokens, default, size, 1, rows)
