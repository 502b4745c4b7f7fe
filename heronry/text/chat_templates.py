"""From a list of messages to a prompt: the one renderer, for every template, tools and thoughts.

- `render` gives the text; `prepare` also what an answer is read with, see tool_calls.py
- what a conversation looks like is in templates.py, tools in tool_styles.py, thoughts in thinking.py; a folder's own
  template in Jinja shows all of it by itself
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import InputError, show
from .jinja_templates import JinjaTemplate
from .messages import ROLES, Message, parse_messages, read_messages
from .model_names import ChatDefaults, chat_defaults, template_by_name, trained_context, usual_template
from .template_choice import AnyTemplate, find_template
from .templates import BOT, FOCUSED, G1, RAVEN, STORY, TEMPLATES, WORLD, Template, parse_template
from .thinking import thinking_by_name
from .tool_styles import TOOL_STYLES, ToolStyle, style_by_name
from .tools import Tool, Tools, read_tools

__all__ = [
    "BOT",
    "FIM_STOPS",
    "FOCUSED",
    "G1",
    "RAVEN",
    "ROLES",
    "STORY",
    "TEMPLATES",
    "WORLD",
    "AnyTemplate",
    "ChatDefaults",
    "Prompt",
    "Template",
    "chat_defaults",
    "fill_in_middle",
    "parse_template",
    "prepare",
    "question_on",
    "read_messages",
    "render",
    "template_by_name",
    "trained_context",
    "usual_template",
]
FIM_STOPS = ("✿",)  # what ends the text of `fill_in_middle`


class Prompt(NamedTuple):
    """What a model reads before it answers.

    context: up to where the answer begins, with its `opening`.
    opening: what the answer begins with before the model writes: a thought, a fence, or "".
    beginning: what of the answer the caller has written already, behind the opening.
    template: in which all of it is shown; its `stops` end the answer.
    tools: that may be called, by name.
    """

    context: str
    opening: str
    beginning: str
    template: AnyTemplate
    tools: dict[str, Tool]

    @property
    def text(self) -> str:
        """All of it."""
        return self.context + self.beginning


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str | AnyTemplate = "g1",
    *,
    tools: Tools | None = None,
    tool_style: str | None = None,
    think: str | None = None,
    opening: str | None = None,
    continue_final_message: bool = False,
    preserve_reasoning: bool = False,
) -> str:
    """The prompt for an answer to a list of messages.

        render([{"role": "user", "content": "Hi"}])  # "User: Hi\\n\\nAssistant:"

    If the last message is of the assistant, the prompt ends in its text, and the model goes on with it.

    Args:
        messages: in OpenAI's form, see `heronry.text.messages.parse_messages`. Texts of "system" at the front become
            one; an empty one is left out.
        template: one of TEMPLATES by its name, a Template or JinjaTemplate, or what `find_template` takes.
        tools: that may be called, see `heronry.text.tools.read_tools`.
        tool_style: one of heronry.text.tool_styles.TOOL_STYLES; None = that of the template.
        think: one of heronry.text.thinking.THINKING; None = as the template has it.
        opening: what the answer begins with, whatever `think` says: "plain" = nothing, "fence" = what a call begins
            with (```json), "call" = the same up to the name of the tool, or a text that begins with a space. None =
            what `think` says, else the fence in styles that are primed with it, unless the last message is a result.
        continue_final_message: the last message must be one to go on with.
        preserve_reasoning: thoughts of all answers are shown. Otherwise only of those after the last message of the
            user, which are part of the answer that is being given.

    Raises:
        InputError: messages, tools or names that are wrong; `param` names the part.
    """
    return prepare(
        messages,
        template,
        tools=tools,
        tool_style=tool_style,
        think=think,
        opening=opening,
        continue_final_message=continue_final_message,
        preserve_reasoning=preserve_reasoning,
    ).text


def prepare(
    messages: Sequence[Mapping[str, Any]],
    template: str | AnyTemplate = "g1",
    *,
    tools: Tools | None = None,
    tool_style: str | None = None,
    think: str | None = None,
    opening: str | None = None,
    continue_final_message: bool = False,
    preserve_reasoning: bool = False,
    after: int = 0,
) -> Prompt:
    """As `render`, with what is needed to read the answer.

    after: so many of the messages, the last of them an answer, were read already: the context is only what comes behind
        them, without the separator in front of it. A template in Jinja, whose text of them may be another by now, shows
        all.
    """
    parsed, known = parse_messages(messages), read_tools(tools)
    last = parsed[-1]
    if last.calls:
        what = "the calls of the last message have no results yet"
        raise InputError(what, param=f"messages.[{len(parsed) - 1}].tool_calls")
    if continue_final_message and last.role != "assistant":
        what = f"continue_final_message needs a last message of the assistant, got one of {last.role!r}"
        raise InputError(what, param="continue_final_message")
    question = next((i for i in reversed(range(len(parsed))) if parsed[i].role == "user"), -1)
    shown = [
        message if preserve_reasoning or i > question else replace(message, reasoning="")
        for i, message in enumerate(parsed)
    ]
    chosen = find_template(template)
    if isinstance(chosen, JinjaTemplate):
        if tool_style is not None or opening is not None:
            name = "opening" if tool_style is None else "tool_style"
            raise InputError(f"{chosen.name}: shows tools and answers by itself; leave {name} out", param=name)
        return _prepare_in_jinja(shown, chosen, known, think)
    return _prepare(shown, chosen, known, tool_style, think, opening, after)


def _prepare(
    messages: Sequence[Message],
    template: Template,
    tools: dict[str, Tool],
    tool_style: str | None,
    think: str | None,
    opening: str | None,
    after: int,
) -> Prompt:
    own = template
    style: ToolStyle | None = None if tool_style is None else style_by_name(tool_style)
    if tools or any(message.calls for message in messages):
        if style is None and template.tool_style is None:
            raise InputError("models with this template have no tools", param="tools")
        style = style or style_by_name(str(template.tool_style))
        own = style.template or template
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    thinking = None if think is None else thinking_by_name(think, messages[asked].content if asked >= 0 else "")
    own = own if thinking is None else own.with_opening(thinking.opening)
    last, beginning = messages[-1], ""
    said = _answer(last, style, is_last=True) if last.role == "assistant" else ""
    if said:
        begun, beginning = own.begin_answer(said)
    elif opening is not None:
        begun = _opening(opening, style or TOOL_STYLES["json"])
    else:
        is_primed = style is not None and style.is_primed and tools and last.role != "tool"
        begun = own.opening or (style.begin if style is not None and is_primed else "")
    begun = begun and own.space + begun.lstrip(" ")
    history = messages[:-1] if last.role == "assistant" else messages
    plain = _plain(history, own, style, tools)
    if thinking is not None and thinking.hint and asked >= 0:
        question = [message for message in plain if message["role"] == "user"][-1]
        question["content"] += thinking.hint
    new = plain[len(_plain(history[:after], own, style, tools)) :] if after else plain
    return Prompt(own.render_prompt(new) + begun, begun, beginning, own, tools)


def _plain(
    messages: Sequence[Message],
    template: Template,
    style: ToolStyle | None,
    tools: dict[str, Tool],
) -> list[dict[str, str]]:
    """The messages as a template shows them, of the roles that it knows: tools and calls have become texts."""
    front = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    system = [template.clean(message.content) for message in messages[:front] if message.content.strip()]
    if tools and style is not None:
        system.append(style.show_tools([*tools.values()]))
    plain: list[dict[str, str]] = [{"role": "system", "content": "\n".join(system)}] if system else []
    for i, message in enumerate(messages[front:], front):
        if message.role == "tool" and style is not None and message.called is not None:
            result = style.show_result(message.called, message.content)
            if template.tool is None and plain[-1]["role"] == "tool":
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "tool", "content": result})
        elif message.role == "assistant":
            plain.append({"role": "assistant", "content": _answer(message, style)})
        elif message.role == "user":
            try:
                question = template.clean(message.content)
            except InputError as error:
                raise InputError(f"messages[{i}]: {error}", param=f"messages.[{i}].content") from error
            plain.append({"role": "user", "content": question, **({"input": message.input} if message.input else {})})
        elif message.content.strip():
            plain.append({"role": "system", "content": message.content})
    return plain


def _answer(message: Message, style: ToolStyle | None, is_last: bool = False) -> str:
    """The text of an answer, with its thought and its calls. is_last: the model goes on with it."""
    parts = [message.content.strip()] if message.content.strip() else []
    if style is not None:
        parts += map(style.show_call, message.calls)
    if message.reasoning:
        thought = f"<think>{message.reasoning}"
        parts = [thought if is_last and not parts else f"{thought}</think>", *parts]
    return "\n".join(parts)


def _opening(opening: str, style: ToolStyle) -> str:
    named = {"": "", "plain": "", "fence": style.begin, "call": style.begin_call()}
    if isinstance(opening, str) and opening in named:
        return named[opening]
    if not isinstance(opening, str) or not opening.startswith(" ") or opening != opening.rstrip():
        what = (
            f"opening must be {', '.join(filter(None, named))}, or a text that begins with a space and ends without one"
        )
        raise InputError(f"{what}, got {show(opening)}", param="opening")
    return opening


def _prepare_in_jinja(
    messages: Sequence[Message],
    template: JinjaTemplate,
    tools: dict[str, Tool],
    think: str | None,
) -> Prompt:
    """The same by a template that knows tools and thoughts itself."""
    variables: dict[str, Any] = {"tools": [tool.in_openais_form() for tool in tools.values()] or None}
    if think is not None:
        thinking_by_name(think, "")
        variables["enable_thinking"] = think not in ("none", "fake", "fake-compact")
    plain = [message.in_openais_form() for message in messages if message.role != "system" or message.content.strip()]
    said = _answer(messages[-1], None, is_last=True) if messages[-1].role == "assistant" else ""
    if messages[-1].role == "assistant":
        plain.pop()
    text = template.render(plain, True, variables=variables)
    opening = template.opening
    if not opening or not text.endswith(opening):  # it depends on what was asked for
        thought = re.search(r" ?<think>?\s*(</think>?\s*)?\Z", text)
        opening = thought[0] if thought else ""
    begun, beginning = template.begin_answer(said) if said else (opening, "")
    return Prompt(text.removesuffix(opening) + begun, begun, beginning, template, tools)


def fill_in_middle(prefix: str, suffix: str) -> str:
    """The prompt for what comes between two texts, as models from G1c on were trained; FIM_STOPS end it."""
    mark = FIM_STOPS[0]
    prefix, suffix = prefix.replace(mark, ""), suffix.replace(mark, "")
    return f"{mark}prefix{mark}{mark}suffix{mark}{suffix}{mark}middle{mark}{prefix}"


def question_on(material: str, question: str) -> str:
    """The prompt for a question that a text answers (RAG), as G1 was trained; best without penalties."""
    return f"{material.strip()}\n\nQuestion: {question.strip().removesuffix('?')}? Answer:"
