"""From a request with messages to a prompt: how it is answered, with which tools and thoughts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field

from ..engine.chat import choose_template
from ..engine.options import Decoding
from ..engine.presets import preset_by_name
from ..engine.sampling import Sampling
from ..engine.tool_grammars import answer_grammar, call_grammar
from ..text.chat_templates import Prompt, Template, prepare
from ..text.thinking import EFFORTS
from ..text.tool_styles import style_by_name
from ..text.tools import Tool, read_tools
from .bodies import SamplingBody
from .errors import ApiError
from .models import ServedModel


class TemplateOptions(BaseModel):
    """What vLLM's clients send for the template."""

    enable_thinking: bool | None = None


class AnswerBody(SamplingBody):
    """How messages are answered."""

    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_style: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_think: bool | None = None
    think: str | bool | None = Field(None, description="a mode of thinking, or whether to think")
    opening: str | None = None
    preserve_reasoning: bool = False
    preset: str | None = None


def answer_decoding(
    model: ServedModel, body: AnswerBody, prompt: Prompt, max_tokens: int, top_logprobs: int | None, rows: int
) -> Decoding:
    """How the answers to a prompt are drawn: where the body does not say it, as its preset has it, or the template. One
    that must be a call has the form of one, and so have the calls of answers that may call a strict tool."""
    preset = None if body.preset is None else preset_by_name(body.preset)
    default = preset or Sampling().replace(**prompt.template.sampling)
    decoding = body.decoding(model, max_tokens, default, top_logprobs, rows)
    name = _style(model, body)
    if name is None or not body.tools:
        return decoding
    style = style_by_name(name)
    tools, call = choose_tools(body, name)
    if call is not None and prompt.opening.strip() == call.strip():
        return replace(decoding, grammar=call_grammar(tools.values(), style))
    if call is None and decoding.grammar is None and any(tool.strict for tool in tools.values()):
        return replace(decoding, grammar=answer_grammar(tools.values(), style))
    return decoding


def _style(model: ServedModel, body: AnswerBody) -> str | None:
    """The style in which tools are shown; None where the template shows them by itself."""
    template = choose_template(model.speaker, None)
    if not isinstance(template, Template):
        return body.tool_style
    return body.tool_style or model.speaker.tool_style or template.tool_style


def read_prompt(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    body: AnswerBody,
    *,
    template: str | None = None,
    names: Mapping[str, str] | None = None,
    continue_final_message: bool = False,
    after: int = 0,
) -> Prompt:
    """The prompt for an answer to messages in OpenAI's form.

    template: one of TEMPLATES by its name; None = that of the model. names: see `Template.with_names`. after: see
        `prepare`.
    """
    speaker = model.speaker
    chosen = choose_template(speaker, template)
    if names:
        if not isinstance(chosen, Template):
            raise ApiError(400, "the template of this model names who speaks itself", f"{next(iter(names))}_name")
        chosen = chosen.with_names(**names)
    plain = isinstance(chosen, Template)
    style = body.tool_style or (speaker.tool_style if plain else None)
    tools, call = choose_tools(body, _style(model, body))
    opening = body.opening or (call if plain else None)
    if opening is None and plain and tools and body.read_grammar() is not None:
        opening = "plain"  # the answer has the form that is asked for, not that of a call
    return prepare(
        messages,
        chosen,
        tools=tools,
        tool_style=style,
        think=choose_thinking(body),
        opening=opening,
        continue_final_message=continue_final_message,
        preserve_reasoning=body.preserve_reasoning,
        after=after,
    )


def prompt_ids(model: ServedModel, prompt: Prompt, *, begins: bool = True) -> list[int]:
    """Its token ids. begins: it begins a text."""
    context = model.speaker.encode(prompt.context, begins=begins)
    return [*context, *model.speaker.tokenizer.encode(prompt.beginning)]


def choose_tools(body: AnswerBody, style: str | None) -> tuple[dict[str, Tool], str | None]:
    """The tools that may be called, and what the answer begins with if one must be."""
    tools, choice = read_tools(body.tools), body.tool_choice
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return {}, None
    if not tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = _object(choice, "allowed_tools")
        named = read_tools(allowed.get("tools"))
        if unknown := [name for name in named if name not in tools]:
            raise ApiError(400, f"tool_choice allows {unknown[0]!r}, which is not among the tools", "tool_choice")
        tools, choice = {name: tools[name] for name in named}, allowed.get("mode", "auto")
        if choice == "auto":
            return tools, None
    if style is None:
        return tools, None
    if choice == "required":
        return tools, f" {style_by_name(style).begin_call()}"
    name = _object(choice, "function").get("name") if isinstance(choice, dict) else None
    if not isinstance(name, str) or name not in tools:
        raise ApiError(400, "tool_choice must be none, auto, required or one of the tools", "tool_choice")
    return {name: tools[name]}, f" {style_by_name(style).begin_call(name)}"


def _object(choice: dict[str, Any], name: str) -> Mapping[str, Any]:
    value = choice.get(name)
    if not isinstance(value, Mapping):
        raise ApiError(400, f"tool_choice must have an object {name!r}", f"tool_choice.{name}")
    return value


def choose_thinking(body: AnswerBody) -> str | None:
    """The mode of thinking; None = that of the template."""
    if isinstance(body.think, str):
        return body.think
    if body.reasoning_effort is not None:
        if body.reasoning_effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise ApiError(400, f"reasoning_effort must be one of {known}", "reasoning_effort")
        return EFFORTS[body.reasoning_effort]
    options = body.chat_template_kwargs
    switches = (body.think, body.enable_think, options.enable_thinking if options else None)
    switch = next((switch for switch in switches if switch is not None), None)
    return None if switch is None else "open" if switch else "fake"
