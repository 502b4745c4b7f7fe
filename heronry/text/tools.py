"""Tools, and calls of them: as OpenAI writes them, and as models write calls in JSON."""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, show

NO_TOOL = "no_tool"  # what G1k is shown among the tools: its one argument is the reply to the user
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    parameters: the JSON Schema of its arguments, an object.
    strict: its arguments are always valid under it, see `heronry.engine.tool_grammars`.
    """

    name: str
    description: str = ""
    parameters: Schema = field(default_factory=dict)
    strict: bool = False

    def in_openais_form(self) -> dict[str, Any]:
        """As one of OpenAI's list of tools."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @property
    def properties(self) -> Schema:
        """The schema of each argument."""
        properties: Schema = self.parameters.get("properties") or {}
        return properties

    @property
    def required(self) -> Sequence[str]:
        """The names of the arguments that must be given."""
        required: Sequence[str] = self.parameters.get("required") or ()
        return required


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. arguments: JSON, an object. id: by which its result names it; equal calls may have others."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)


Tools = Sequence[Mapping[str, Any]] | Mapping[str, Schema | Tool]


def read_tools(tools: Tools | None) -> dict[str, Tool]:
    """The tools by name.

    Args:
        tools: OpenAI's list, {"type": "function", "function": {"name", "description", "parameters"}} each; or the JSON
            Schema of each one's arguments by its name; or what this returns.

    Raises:
        InputError: another type of tool, a name that is missing or given twice, a schema that is none of an object.
    """
    if tools is None:
        return {}
    if isinstance(tools, Mapping):
        if all(isinstance(tool, Tool) for tool in tools.values()):
            return {**tools}  # type: ignore[dict-item]
        tools = [{"function": {"name": name, "parameters": schema}} for name, schema in tools.items()]
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InputError(f"tools must be a list of tools, got {show(tools)}", param="tools")
    read: dict[str, Tool] = {}
    for i, given in enumerate(tools):
        tool = _read_tool(given, f"tools.[{i}]")
        if tool.name in read:
            raise InputError(f"there are two tools named {tool.name!r}", param=f"tools.[{i}].function.name")
        read[tool.name] = tool
    return read


def _read_tool(given: object, where: str) -> Tool:
    """One of OpenAI's. where: for errors."""
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        kind = given.get("type") if isinstance(given, Mapping) else given
        raise InputError(f"a tool must be of type 'function', got {show(kind)}", param=f"{where}.type")
    function = given.get("function")
    if not isinstance(function, Mapping):
        raise InputError(f"a tool must have a function, got {show(function)}", param=f"{where}.function")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"a tool must have a name, got {show(name)}", param=f"{where}.function.name")
    if not isinstance(description, str | None):
        message = f"the description of a tool must be a text, got {show(description)}"
        raise InputError(message, param=f"{where}.function.description")
    schema = function.get("parameters")
    parts = schema if isinstance(schema, Mapping) else {}
    properties, required = parts.get("properties") or {}, parts.get("required") or []
    is_object = isinstance(schema, Mapping | None) and parts.get("type", "object") == "object"
    if not is_object or not isinstance(properties, Mapping) or not isinstance(required, Sequence):
        message = f"the parameters of a tool must be the JSON Schema of an object, got {show(schema)}"
        raise InputError(message, param=f"{where}.function.parameters")
    try:
        compact(parts)
    except (ValueError, TypeError, RecursionError) as error:
        message = f"the parameters of tool {name!r} cannot be written as JSON: {error}"
        raise InputError(message, param=f"{where}.function.parameters") from error
    return Tool(name, (description or "").strip(), parts, function.get("strict") is True)


def compact(value: object) -> str:
    """A value as JSON without white space. A half of a surrogate pair is escaped, for it cannot be encoded.

    Raises:
        ValueError, TypeError: it has a number that is not finite, or is no JSON.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if any("\ud800" <= character <= "\udfff" for character in text):
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text


def read_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call from JSON; nothing at all is no arguments.

    Raises:
        ValueError: no JSON, or no object.
    """
    value = read_json_text(text) if text.strip() else {}
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_json_text(text: str) -> Any:
    """The value of a text in JSON, whose strings may hold line breaks as they are.

    Raises:
        ValueError: it is none, is nested too deeply, or has a number that is not finite.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, strict=False, parse_constant=refuse)
        compact(value)  # 1e999 is infinity
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def read_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall] | None:
    """The calls that a text is: one, or a list of them, of tools by exactly their names, as {"name", "arguments"} (or
    "parameters"), perhaps within {"function"}. It may be in JSON or a literal of Python. None if it is anything else;
    nothing is repaired."""
    try:
        value = read_json_text(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
            if json.loads(compact(value)) != value:  # keys that are no text, tuples
                return None
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return None
    calls = [_read_call(entry, tools) for entry in (value if isinstance(value, list) else [value])]
    whole = [call for call in calls if call is not None]
    return whole if whole and len(whole) == len(calls) else None


def _read_call(value: object, tools: Mapping[str, Tool]) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    try:
        arguments = read_arguments(arguments) if isinstance(arguments, str) else {} if arguments is None else arguments
    except ValueError:
        return None
    if not isinstance(arguments, dict):
        return None
    if name in tools:
        tool = tools[name]
        arguments = {key: x for key, x in arguments.items() if x is not None or not _is_left_out(key, tool)}
    elif name != NO_TOOL or not isinstance(arguments.get("reason"), str):
        return None
    return ToolCall(name, compact(arguments))


def _is_left_out(key: str, tool: Tool) -> bool:
    """Whether null for this argument means that it is not given: it need not be, and null is no value of it."""
    return key in tool.properties and key not in tool.required and not _takes_null(tool.properties[key])


def _takes_null(schema: object) -> bool:
    if not isinstance(schema, Mapping):
        return schema is not False
    if schema.get("nullable") is True:
        return True
    kind = schema.get("type")
    if kind is not None:
        return kind == "null" or (isinstance(kind, list) and "null" in kind)
    if "const" in schema:
        return schema["const"] is None
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    choices = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(choices, list):
        return any(_takes_null(choice) for choice in choices)
    return "$ref" not in schema
