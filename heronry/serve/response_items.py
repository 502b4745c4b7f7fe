"""Items of the Responses API, and the messages, tools and forms of /v1/chat/completions that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.kept_states import new_name
from ..errors import show
from .errors import ApiError

Item = dict[str, Any]
TEXTS = ("input_text", "output_text", "text")  # types of parts with a text


def read_items(given: str | Sequence[Any]) -> list[Item]:
    """The items of an input, each with an id; ApiError for what is none."""
    if not given:
        raise ApiError(400, "the input is empty", "input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_read_item(item, f"input.[{i}]") for i, item in enumerate(given)]


def _read_item(item: object, where: str) -> Item:
    if not isinstance(item, Mapping):
        raise ApiError(400, f"an item must be an object, got {show(item)}", where)
    kind = item.get("type") or "message"
    fields: dict[str, Any]
    if kind == "message":
        if item.get("role") not in ("user", "assistant", "system", "developer"):
            what = f"the role must be user, assistant, system or developer, got {show(item.get('role'))}"
            raise ApiError(400, what, f"{where}.role")
        part = "output_text" if item["role"] == "assistant" else "input_text"
        fields = {"role": item["role"], "content": _read_parts(item.get("content"), part, f"{where}.content")}
    elif kind == "function_call":
        fields = {name: _text(item, name, where) for name in ("call_id", "name", "arguments")}
    elif kind == "function_call_output":
        output = item.get("output")
        if not isinstance(output, str):
            output = _read_parts(output, "input_text", f"{where}.output")
        fields = {"call_id": _text(item, "call_id", where), "output": output}
    elif kind == "reasoning":
        content = _read_parts(item.get("content") or [], "reasoning_text", f"{where}.content")
        summary = _read_parts(item.get("summary") or [], "summary_text", f"{where}.summary")
        fields = {"summary": summary, "content": content}
    else:
        raise ApiError(400, f"items of type {show(kind)} are not served here", f"{where}.type")
    given = item.get("id")
    prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}[kind]
    return {"id": given if isinstance(given, str) and given else new_name(prefix), "type": kind} | fields


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{name} must be a text, got {show(value)}", f"{where}.{name}")
    return value


def _read_parts(content: object, kind: str, where: str) -> list[Item]:
    """The parts of a content, of this type."""
    if isinstance(content, str):
        return [_part(kind, content)]
    if not isinstance(content, Sequence):
        raise ApiError(400, f"expected a text or a list of parts, got {show(content)}", where)
    found = []
    for j, part in enumerate(content):
        given = part.get("type") if isinstance(part, Mapping) else part
        if not isinstance(part, Mapping) or given not in (*TEXTS, kind):
            raise ApiError(400, f"a part must be of type {kind!r}, got {show(given)}", f"{where}.[{j}].type")
        found.append(_part(kind, _text(part, "text", f"{where}.[{j}]")))
    return found


def _part(kind: str, text: str) -> Item:
    return {"type": kind, "text": text} | ({"annotations": [], "logprobs": []} if kind == "output_text" else {})


def to_messages(items: Sequence[Item]) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages that items stand for, and the number of the first item of each: a thought, a text and calls in a
    row are one answer."""
    messages: list[dict[str, Any]] = []
    origins: list[int] = []

    def answer(*, is_new: bool) -> dict[str, Any]:
        """The answer that goes on here."""
        if is_new or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
            origins.append(i)
        return messages[-1]

    for i, item in enumerate(items):
        last = messages[-1] if messages else {}
        has_said = bool(last.get("content") or last.get("tool_calls"))
        if item["type"] == "reasoning":
            answer(is_new=has_said)["reasoning_content"] = _join(item["content"] or item["summary"])
        elif item["type"] == "function_call":
            call = {"name": item["name"], "arguments": item["arguments"]}
            calls = answer(is_new=False).setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": call})
        elif item["type"] == "message" and item["role"] == "assistant":
            answer(is_new=has_said)["content"] = _join(item["content"])
        else:
            if item["type"] == "message":
                message = {"role": item["role"], "content": _join(item["content"])}
            else:
                output = item["output"]
                text = output if isinstance(output, str) else _join(output)
                message = {"role": "tool", "tool_call_id": item["call_id"], "content": text}
            messages.append(message)
            origins.append(i)
    return messages, origins


def _join(parts: Sequence[Item]) -> str:
    return "".join(part["text"] for part in parts)


def nested_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as /v1/chat/completions takes them."""
    if tools is None:
        return None
    for i, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise ApiError(400, f"unsupported tool type {show(tool.get('type'))}", f"tools.[{i}].type")
    return [_nested(tool) for tool in tools]


def nested_choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """tool_choice as /v1/chat/completions takes it."""
    if choice is None or isinstance(choice, str):
        return choice
    if choice.get("type") == "function":
        return _nested(choice)
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), Sequence):
        tools = [_nested(tool) if isinstance(tool, Mapping) else tool for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    what = f"tool_choice must be none, auto, required, a function or allowed_tools, got {show(choice)}"
    raise ApiError(400, what, "tool_choice")


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool.items() if name != "type"}
    return {"type": tool.get("type"), "function": function}
