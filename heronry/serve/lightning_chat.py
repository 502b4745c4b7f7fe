r"""What rwkv_lightning adds to OpenAI's chat: its names of the fields, and `contents` in place of messages.

One content without "\n\nAssistant:" in it is a message of the user; all others are raw texts, each of which is
continued. What is wrong with a body that has contents is told in rwkv_lightning's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, Field, ValidationError

from .bodies import listed, read_stops
from .errors import ApiError
from .gate import find_owner
from .lightning_batch import Batch, text_stops
from .lightning_bodies import (
    MOST_TOKENS,
    AdapterFields,
    CompletionsBody,
    error_shape,
    find_model,
    identify,
    uploaded_state,
)
from .prompts import AnswerBody
from .server import server_of

if TYPE_CHECKING:
    from typing_extensions import Self

THINKING = {  # think_type -> our mode of thinking
    "none": "none",
    "fast": "fake",
    "free": "open",
    "preferChinese": "chinese",
    "en": "medium",
    "enShort": "short",
    "en_short": "short",
    "enLong": "long",
    "en_long": "long",
}
ThinkType = Literal["none", "fast", "free", "preferChinese", "en", "enShort", "en_short", "enLong", "en_long"]
NAMES = {
    "alpha_presence": "presence_penalty",
    "alpha_frequency": "frequency_penalty",
    "alpha_decay": "penalty_decay",
}


def _read_stop_tokens(stops: list[int | str] | None) -> list[int | str] | None:
    read_stops([stop for stop in stops or () if isinstance(stop, str)])
    return stops


class LightningFields(AnswerBody, AdapterFields):
    """Fields of rwkv_lightning; where OpenAI's are given as well, those count."""

    messages: list[dict[str, Any]] | None = None
    contents: list[str] | None = Field(None, description="in place of messages: a message of the user, or raw texts")
    max_completion_tokens: int | None = Field(None, ge=0, le=1 << 30)
    max_tokens: int | None = Field(None, ge=0, le=1 << 30, description="the old name")
    system: str | None = Field(None, description="in front of all messages")
    think_type: ThinkType | None = None
    alpha_presence: float | None = Field(None, ge=-1e6, le=1e6)
    alpha_frequency: float | None = Field(None, ge=-1e6, le=1e6)
    alpha_decay: float | None = Field(None, ge=0, le=1)
    stop_tokens: Annotated[list[int | str] | None, AfterValidator(_read_stop_tokens)] = Field(
        None, description="token ids and texts"
    )
    chunk_size: int | None = Field(None, ge=1, description="tokens of an event, of raw texts")

    @property
    def has_raw_texts(self) -> bool:
        if self.messages is not None or self.contents is None:
            return False
        return len(self.contents) != 1 or "\n\nAssistant:" in self.contents[0]

    def in_openais_words(self) -> Self:
        """The same without the fields of this class."""
        changes: dict[str, Any] = {
            ours: getattr(self, theirs)
            for theirs, ours in NAMES.items()
            if getattr(self, ours) is None and getattr(self, theirs) is not None
        }
        if self.stop_tokens is not None:
            ids = [stop for stop in self.stop_tokens if isinstance(stop, int)]
            texts = [stop for stop in self.stop_tokens if isinstance(stop, str)]
            changes["stop_token_ids"] = [*(self.stop_token_ids or ()), *ids]
            changes["stop"] = [*listed(self.stop), *texts]
        messages = self.messages or []
        switches = (self.think, self.enable_think, self.reasoning_effort, self.chat_template_kwargs)
        if self.think_type is not None:
            changes["think"] = THINKING[self.think_type]
        elif all(switch is None for switch in switches):
            if self.state_id is not None:  # tuned states were trained on such turns
                changes["think"] = "none"
            elif self.messages is None:
                changes["think"] = "fake"
        if self.messages is None and self.contents is not None:
            messages = [{"role": "user", "content": self.contents[0]}]
            if self.preset is None:
                changes["preset"] = "lightning"
            if self.max_tokens is None:
                changes["max_tokens"] = MOST_TOKENS
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.model_copy(update=changes | {"messages": messages})


async def continue_raw_texts(request: Request) -> Response:
    """The reply to a body with raw texts."""
    try:
        body = CompletionsBody.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    model = find_model(request, body)
    begin = await uploaded_state(request, model, body)
    return await Batch(model, body.contents, text_stops(model, body), body, request, begin).reply("rwkv7-batch")


async def recognize(request: Request) -> None:
    """Before a body is checked: the shape of its errors, and whose it is where it holds the key as a password."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    given = body if isinstance(body, dict) else {}
    if given.get("messages") is None and given.get("contents") is not None:
        request.state.error_shape = error_shape
    try:
        await identify(request)
    except ApiError:
        if given.get("password") is None and given.get("contents") is None:
            find_owner(server_of(request).keys, "")  # which says what OpenAI's clients expect
        raise
