"""Calls of tools that are valid: which texts are one, in the style that the tools are shown in."""

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
    start, calls = _calls(tools, style, style.begin)
    return Grammar.from_text("\n".join([f"start: {start}", *calls]))


def answer_grammar(tools: Iterable[Tool], style: ToolStyle) -> Grammar | None:
    """Any text, and in it any number of calls: behind the mark of one only a call can follow, the arguments of `strict`
    tools valid under their schema, those of others any object. None for a style whose calls have no mark of their own.

    Raises:
        InputError: see `call_grammar`.
    """
    if not style.begin.startswith("<"):
        return None
    loose = [tool if tool.strict else Tool(tool.name) for tool in tools]
    call, calls = _calls(loose, style, "")
    # with stop= in place of suffix=, no token that goes beyond the mark would be allowed
    rules = [f"text[suffix={json.dumps(style.begin)}]: /(.|\\n)*/", "rest: /(.|\\n)*/", *calls]
    return Grammar.from_text("\n".join([f"start: (text ({call}))* rest", *rules]))


def _calls(tools: Iterable[Tool], style: ToolStyle, begin: str) -> tuple[str, list[str]]:
    """What stands for a call of any tool, and the rules that say how each is written. begin: of every call."""
    end = json.dumps(style.show_call(ToolCall("", "{}")).rpartition("{}")[2])
    rules = []
    for i, tool in enumerate(tools):
        arguments = Grammar.from_schema({"type": "object", **tool.parameters}).source
        head = begin + style.begin_call(tool.name).removeprefix(style.begin)
        rules.append(f'call{i}: {json.dumps(head)} " "? %json {arguments} {end}')
    return " | ".join(f"call{i}" for i in range(len(rules))), rules
