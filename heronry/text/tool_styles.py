"""How models are shown tools, calls and results; a style for each kind of training data.

- `list`, `json`: RWKV-7 G1's official forms, which differ in the list alone; an answer is primed with its fence
- `function_calling`: a form of its own for the whole conversation (G1g)
- `xml`: calls in <tool_call> (G1h); how tools and results are shown there is not published
- `g1k`: the contract of an agent program: schemas flat, for these models copy them as values, and `no_tool` among the
  tools, whose argument is the reply
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import unknown_name
from .templates import FUNCTION_CALLING, Template
from .tools import NO_TOOL, Tool, ToolCall, compact


@dataclass(frozen=True)
class ToolStyle:
    """One way to show tools.

    show_tools: the tools, as part of the system text.
    show_call: a call, as part of an answer.
    show_result: the result of a call, given as JSON or, if it is none, as text.
    begin: what a call begins with.
    begin_name: what follows up to the name.
    begin_arguments: what follows the name up to the arguments.
    is_primed: an answer begins with `begin` unless the caller says how.
    template: in which all of a conversation with tools is shown; None = in the one it has.
    """

    show_tools: Callable[[Sequence[Tool]], str]
    show_call: Callable[[ToolCall], str]
    show_result: Callable[[ToolCall, str], str]
    begin: str
    begin_name: str = '{"name":"'
    begin_arguments: str = '","arguments":'
    is_primed: bool = False
    template: Template | None = None

    def begin_call(self, name: str | None = None) -> str:
        """What a call begins with, up to its name; with a name up to the arguments. With a space in front it is an
        `opening` of `render`."""
        return self.begin + self.begin_name + (f"{name}{self.begin_arguments}" if name is not None else "")


def style_by_name(name: str) -> ToolStyle:
    """Raises InputError if there is no such style."""
    if not isinstance(name, str) or name not in TOOL_STYLES:
        raise unknown_name("tool style", name, TOOL_STYLES, param="tool_style")
    return TOOL_STYLES[name]


def _describe_type(schema: object, quote: Callable[[str], str]) -> str:
    """The type of an argument in a few words: string, integer[], "celsius" | "fahrenheit"."""
    if not isinstance(schema, Mapping):
        return "any"
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]]
        return " | ".join(quote(x) if isinstance(x, str) else compact(x) for x in values)
    choices = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(choices, list):
        return " | ".join(_describe_type(choice, quote) for choice in choices)
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(map(str, kind))
    if kind == "array" and "items" in schema:
        items = _describe_type(schema["items"], quote)
        return f"({items})[]" if " " in items else f"{items}[]"
    return str(kind or "any")


def _signature(tool: Tool) -> str:
    arguments = [
        f"{name}{'' if name in tool.required else '?'}: {_describe_type(schema, compact)}"
        for name, schema in tool.properties.items()
    ]
    return f"- {tool.name}({', '.join(arguments)})"


def _lines(entries: Sequence[Any]) -> str:
    return "[\n" + ",\n".join(map(compact, entries)) + "\n]"


def _entry(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    about = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **about, "arguments": {**arguments}}


def _json_list(tools: Sequence[Tool]) -> str:
    return "Tools:\n" + _lines([_entry(tool, tool.properties) for tool in tools])


def _flat(tool: Tool) -> dict[str, str]:
    def flat(name: str, schema: object) -> str:
        return _describe_type(schema, str) + ("" if name in tool.required else ", optional")

    return {name: flat(name, schema) for name, schema in tool.properties.items()}


def _g1k_list(tools: Sequence[Tool]) -> str:
    entries = [_entry(tool, _flat(tool)) for tool in tools]
    if all(tool.name != NO_TOOL for tool in tools):
        none = Tool(NO_TOOL, "None of the tools is needed; reason is the reply.")
        entries.append(_entry(none, {"reason": "the reply to the user"}))
    return f"<tools>{_lines(entries)}</tools>"


def _described(tools: Sequence[Tool]) -> str:
    lines = []
    for tool in tools:
        schema = tool.parameters or {"type": "object", "properties": {}}
        about = [f"**Description:** {tool.description}"] if tool.description else []
        lines += [f"### `{tool.name}`", *about, "**Parameters:**", _fence(_indented(schema))]
    return "\n".join(
        [
            *lines,
            "To call one of these tools, write exactly this format:",
            f"**Tool Call:**\n{_fence(json.dumps({'name': 'tool_name', 'arguments': {'key': 'value'}}))}",
            "Do not invent tool call IDs or write tool outputs yourself.",
        ]
    )


def _indented(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _fence(text: str) -> str:
    return f"```json\n{text}\n```"


def _call(call: ToolCall) -> str:
    return f'{{"name":{compact(call.name)},"arguments":{call.arguments}}}'


def _compact_result(text: str) -> str:
    value = _value(text)
    return text if value is None else compact(value)


def _value(text: str) -> Any:
    """The value of a result; None if it is no JSON."""
    try:
        value = json.loads(text)
        compact(value)
        return value
    except (ValueError, RecursionError):
        return None


def _indented_result(call: ToolCall, text: str) -> str:
    value = _value(text)
    return _fence(text if value is None else _indented(value))


def _indented_call(call: ToolCall) -> str:
    value = {"name": call.name, "arguments": json.loads(call.arguments)}
    return f"**Tool Call:**\n{_fence(_indented(value))}"


def _g1k_result(call: ToolCall, text: str) -> str:
    value = _value(text)
    result: dict[str, Any] = {"ok": True, "tool": call.name, "result": text if value is None else value}
    if isinstance(value, dict) and [*value] == ["error"]:
        result = {"ok": False, "tool": call.name, "error": value["error"]}
    return f"<tool_response>{compact(result)}</tool_response>"


JSON_ALONE = "\nReturn only a JSON function call."
JSON = ToolStyle(
    show_tools=lambda tools: _json_list(tools) + JSON_ALONE,
    show_call=lambda call: _fence(_call(call)),
    show_result=lambda call, text: f"Function output:\n{_compact_result(text)}",
    begin="```json",
    begin_name='\n{"name":"',
    is_primed=True,
)
TOOL_STYLES = {
    "json": JSON,
    "list": ToolStyle(
        show_tools=lambda tools: "\n".join(["Tools:", *map(_signature, tools)]) + JSON_ALONE,
        show_call=JSON.show_call,
        show_result=JSON.show_result,
        begin=JSON.begin,
        begin_name=JSON.begin_name,
        is_primed=True,
    ),
    "function_calling": ToolStyle(
        show_tools=_described,
        show_call=_indented_call,
        show_result=_indented_result,
        begin="**Tool Call:**\n```json",
        begin_name='\n{\n  "name": "',
        begin_arguments='",\n  "arguments":',
        template=FUNCTION_CALLING,
    ),
    "xml": ToolStyle(
        show_tools=lambda tools: (
            _json_list(tools)
            + '\nTo call a function, write <tool_call>{"name":"function_name","arguments":{"key":"value"}}</tool_call>.'
        ),
        show_call=lambda call: f"<tool_call>{_call(call)}</tool_call>",
        show_result=lambda call, text: f"<tool_response>{_compact_result(text)}</tool_response>",
        begin="<tool_call>",
    ),
    "g1k": ToolStyle(
        show_tools=_g1k_list,
        show_call=lambda call: f"<tool_call>{_call(call)}</tool_call>",
        show_result=_g1k_result,
        begin="<tool_call>",
    ),
}
