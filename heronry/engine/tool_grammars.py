"""Calls of tools that must be written: which texts are one, in the style that the tools are shown in."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ..text.tool_styles import ToolStyle
from ..text.tools import Tool, ToolCall
from .constraints import Grammar


def call_grammar(tools: Iterable[Tool], style: ToolStyle) -> Grammar:
    """One call of one of the tools, its arguments valid under the tool's schema.

    Raises:
        InputError: the schemas together are too large.
    """
    end = json.dumps(style.show_call(ToolCall("", "{}")).rpartition("{}")[2])
    calls = []
    for i, tool in enumerate(tools):
        arguments = Grammar.from_schema({"type": "object", **tool.parameters}).source
        calls.append(f'call{i}: {json.dumps(style.begin_call(tool.name))} " "? %json {arguments} {end}')
    start = " | ".join(f"call{i}" for i in range(len(calls)))
    return Grammar.from_text("\n".join([f"start: {start}", *calls]))
