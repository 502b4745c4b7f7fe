"""Lists of messages from outside, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, show
from .tools import ToolCall, compact, read_arguments

ROLES = ("system", "user", "assistant")  # of a conversation without tools
ALL_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One message.

    role: system, user, assistant or tool.
    content: its text; "" for an answer that only calls tools.
    input: what a message of the user is about, for templates with a place for it.
    reasoning: the thought before an answer.
    calls: of tools, at the end of an answer.
    called: what the result of a tool answers.
    """

    role: str
    content: str
    input: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    called: ToolCall | None = None

    def in_openais_form(self) -> dict[str, Any]:
        """As templates in Jinja take it: the arguments of calls are objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.input:
            message["input"] = self.input
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": x.id, "type": "function", "function": {"name": x.name, "arguments": json.loads(x.arguments)}}
                for x in self.calls
            ]
        if self.called is not None:
            message |= {"tool_call_id": self.called.id, "name": self.called.name}
        return message


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Checks a list of messages of "system" (or "developer"), "user", "assistant" and "tool" in any order.

    A content is a text or a list of {"type": "text", "text"}; that of an answer may be missing. An answer may have
    "reasoning_content" (or "reasoning") and "tool_calls"; a result has the "tool_call_id" of an earlier call.

    Raises:
        InputError: another role or content, an empty message of the user, arguments that are no JSON object, a result
            of no call; the message is named, and `param` names the part of it.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a list of messages, got {show(messages)}", param="messages")
    if not messages:
        raise InputError("there are no messages", param="messages")
    parsed: list[Message] = []
    calls: dict[str, ToolCall] = {}
    for i, message in enumerate(messages):
        parsed.append(_parse_message(message, i, calls))
        calls |= {call.id: call for call in parsed[-1].calls}
    return parsed


def _parse_message(message: object, i: int, calls: Mapping[str, ToolCall]) -> Message:
    if not isinstance(message, Mapping):
        what = f"messages[{i}] must be a dict with role and content, got {show(message)}"
        raise InputError(what, param=f"messages.[{i}]")
    role = message.get("role")
    if role not in ALL_ROLES:
        raise _wrong(i, "role", f"role must be one of {', '.join(ALL_ROLES)}, got {show(role)}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        content = _join_parts(content, i)
    if role == "user":
        if not content.strip():
            raise _wrong(i, "content", "the message is empty")
        return Message(role, content, input=_text_of(message, "input", i))
    if role == "assistant":
        reasoning = _text_of(message, "reasoning_content", i) or _text_of(message, "reasoning", i)
        return Message(role, content, reasoning=reasoning.strip(), calls=_parse_calls(message.get("tool_calls"), i))
    if role == "tool":
        name = message.get("tool_call_id")
        if not isinstance(name, str) or name not in calls:
            raise _wrong(i, "tool_call_id", f"tool_call_id must be that of an earlier call, got {show(name)}")
        return Message(role, content, called=calls[name])
    return Message("system", content)


def _join_parts(content: object, i: int) -> str:
    """The text of a content in parts."""
    if not isinstance(content, Sequence):
        raise _wrong(i, "content", f"content must be a text or a list of text parts, got {show(content)}")
    texts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or kind != "text":
            raise _wrong(i, f"content.[{j}].type", f"a part of the content must be of type 'text', got {show(kind)}")
        if not isinstance(text := part.get("text"), str):
            raise _wrong(i, f"content.[{j}].text", f"a part of the content must have a text, got {show(text)}")
        texts.append(text)
    return "".join(texts)


def _text_of(message: Mapping[str, Any], name: str, i: int) -> str:
    """A text that a message may have beside its content."""
    text = message.get(name)
    if not isinstance(text, str | None):
        raise _wrong(i, name, f"{name} must be a text, got {show(text)}")
    return text or ""


def _parse_calls(given: object, i: int) -> tuple[ToolCall, ...]:
    if given is None:
        return ()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise _wrong(i, "tool_calls", f"tool_calls must be a list of calls, got {show(given)}")
    calls = []
    for j, call in enumerate(given):
        where = f"tool_calls.[{j}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise _wrong(i, f"{where}.function", f"a call must have a function, got {show(call)}")
        identity, name, arguments = call.get("id"), function.get("name"), function.get("arguments")
        if not isinstance(identity, str):
            raise _wrong(i, f"{where}.id", f"a call must have an id, got {show(identity)}")
        if not isinstance(name, str) or not name.strip():
            raise _wrong(i, f"{where}.function.name", f"a call must have the name of a function, got {show(name)}")
        try:
            given_arguments = dict(arguments) if isinstance(arguments, Mapping) else read_arguments(arguments or "")
            text = compact(given_arguments)
        except (ValueError, TypeError, AttributeError):
            what = f"the arguments of a call must be a JSON object, got {show(arguments)}"
            raise _wrong(i, f"{where}.function.arguments", what) from None
        calls.append(ToolCall(name, text, identity))
    return tuple(calls)


def _wrong(i: int, part: str, what: str) -> InputError:
    return InputError(f"messages[{i}]: {what}", param=f"messages.[{i}].{part}")


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Checks a conversation that goes on turn by turn: texts of "system" first, then "user" and "assistant" in turn.
    Returns the messages with role and content alone, those of the user also with an "input" if they have one; an empty
    system text is left out.

    Raises:
        InputError: as `parse_messages`; or another order, or a call of a tool.
    """
    checked: list[dict[str, str]] = []
    for i, message in enumerate(parse_messages(messages) if messages else ()):
        role, last = message.role, checked[-1]["role"] if checked else None
        if role not in ROLES or message.calls:
            raise InputError(f"messages[{i}]: a conversation that goes on turn by turn knows no tools")
        if role == "assistant" and last is None:
            raise InputError(f"messages[{i}]: a conversation begins with 'system' or 'user', got {role!r}")
        if last is not None and role != ("assistant" if last == "user" else "user"):
            raise InputError(f"messages[{i}]: a message of {role!r} cannot follow one of {last!r}")
        if role != "system" or message.content.strip():
            about = {"input": message.input} if message.input else {}
            checked.append({"role": role, "content": message.content, **about})
    return checked
