"""What a model reads before it writes a response: the whole conversation, or what follows a kept state."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field

from ..errors import InputError
from .bodies import check_json
from .errors import ApiError
from .grammars import ResponseFormat
from .kept_responses import KeptResponse
from .models import ServedModel
from .prompt_reading import Known, PromptReading, front_of
from .prompts import AnswerBody, read_prompt
from .response_items import nested_choice, nested_tools, read_items, to_messages


class TextFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(BaseModel):
    format: TextFormat | None = None


class ReasoningOptions(BaseModel):
    effort: str | None = None
    summary: str | None = None


class ResponseBody(AnswerBody):
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    max_output_tokens: int | None = Field(None, ge=0, le=1 << 30)
    store: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    background: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def with_logprobs(self) -> bool:
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    def as_chat(self) -> ResponseBody:
        """With tools, efforts and forms as /v1/chat/completions takes them; ApiError for what is not served."""
        if self.conversation is not None:
            raise ApiError(400, "conversation is not served here; use previous_response_id", "conversation")
        for name in ("background", "stop"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not served here", name)
        if self.n not in (None, 1):
            raise ApiError(400, "a response has one answer", "n")
        try:  # what is told back and kept
            check_json(self.model_dump(by_alias=True))
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        changes: dict[str, Any] = {"tools": nested_tools(self.tools), "tool_choice": nested_choice(self.tool_choice)}
        if self.reasoning is not None and self.reasoning.effort is not None:
            changes["reasoning_effort"] = self.reasoning.effort
        form = self.text.format if self.text is not None else None
        if form is not None and form.type != "text":
            if form.type == "json_schema" and form.schema_ is None:
                raise ApiError(400, "json_schema needs a schema", "text.format.schema")
            changes["response_format"] = ResponseFormat.model_validate(
                {"type": form.type, "json_schema": {"schema": form.schema_}}
            )
        return self.model_copy(update=changes)


class ResponsePrompt(PromptReading):
    """
    Attributes:
        items: all that comes before the answer.
        front: says whether two prompts stand under the same instructions and tools, in the same template.
    """

    def __init__(self, model: ServedModel, body: ResponseBody, previous: KeptResponse | None):
        """
        Args:
            body: from `as_chat`.

        Raises:
            ApiError, InputError: what is wrong with it; `param` names the part.
        """
        new = read_items(body.input or "")
        earlier = previous.all_items if previous is not None else []
        self.items = [*earlier, *new]
        instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
        known = [*instructions, *to_messages(earlier)[0]]
        added, origins = to_messages(new)
        messages = [*known, *added]
        try:
            prompt = read_prompt(model, messages, body)
        except InputError as error:
            raise _in_items(error, len(known), origins) from error
        style = body.tool_style or model.speaker.tool_style
        self.front = front_of(model, prompt, body.instructions, style)
        before = None
        if previous is not None and previous.state is not None and previous.front == self.front:
            before = Known(previous.state, previous.n_tokens, previous.owed)
        super().__init__(model, prompt, before, lambda: read_prompt(model, messages, body, after=len(known)))


def _in_items(error: InputError, n_known: int, origins: list[int]) -> ApiError:
    """An error of a message or a tool as one of the item or the flat tool that it comes from."""
    param: str | None = getattr(error, "param", None)
    text = str(error)
    if param is not None and (found := re.match(r"messages\.\[(\d+)\](.*)", param, re.DOTALL)):
        text = re.sub(r"^messages\[\d+\]: ", "", text)
        i = int(found[1]) - n_known
        param = f"input.[{origins[i]}]{found[2]}" if 0 <= i < len(origins) else "instructions" if i < 0 else "input"
    elif param is not None:
        param = param.replace("].function.", "].")
    return ApiError(400, text, param)
