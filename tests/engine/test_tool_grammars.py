"""Calls that must be written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from heronry.engine.tool_grammars import answer_grammar, call_grammar
from heronry.text.tokenizers import WorldTokenizer
from heronry.text.tool_calls import parse
from heronry.text.tool_styles import TOOL_STYLES
from heronry.text.tools import read_tools

pytest.importorskip("llguidance")

TOOLS = read_tools(
    {
        "weather": {
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "ping": {},
        "web search": {
            "properties": {"query": {"$ref": "#/$defs/text"}},
            "required": ["query"],
            "$defs": {"text": {"type": "string"}},
        },
    }
)


@pytest.mark.parametrize("name", TOOL_STYLES)
def test_a_call_in_every_style(name):
    """What the style shows as a call fits, white space within its JSON apart, and nothing else can follow."""
    style, tokenizer = TOOL_STYLES[name], WorldTokenizer()
    opening = f" {style.begin_call()}"
    matcher = call_grammar(TOOLS.values(), style).in_answer(opening).matcher(tokenizer, 65536)
    first = {tokenizer.vocabulary[i] for i in matcher.allowed().nonzero()[:, 0].tolist()}
    assert {b"w", b"p", b"ping"} <= first
    assert all(any(x.startswith(y) or y.startswith(x) for x in (b"weather", b"ping", b"web search")) for y in first)
    text = "weather" + style.begin_arguments
    for token in tokenizer.encode(text):
        assert matcher.allowed()[token]
        matcher.consume(token)
    for _ in range(99):
        if matcher.ended:
            break
        for token in matcher.forced() or [int(matcher.allowed().nonzero()[0, 0])]:
            matcher.consume(token)
            text += tokenizer.decode([token])
    parsed = parse(opening + text, TOOLS)
    assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] in (
        [("weather", {"city": "Paris"})],
        [("weather", {"city": "Rome"})],
    )
    assert not parsed.content


def test_calls_in_any_text():
    """Behind the mark of a call only one of the tools can be called, a strict one with valid arguments."""
    tokenizer, style = WorldTokenizer(), TOOL_STYLES["xml"]
    tools = {name: replace(tool, strict=name == "weather") for name, tool in TOOLS.items()}
    start = answer_grammar(tools.values(), style).in_answer(" <think").matcher(tokenizer, 65536)

    def fits(text: str) -> bool:
        matcher = start.copy()
        for token in tokenizer.encode(text):
            if not matcher.allowed()[token]:
                return False
            matcher.consume(token)
        return matcher.complete

    thought = "> <tool_call> is what I write.</think>\n"
    rome = '<tool_call>{"name":"weather","arguments":{"city": "Rome"}}</tool_call>'
    loose = '<tool_call>{"name":"web search","arguments":{"anything": [1, "<tool_call>"]}}</tool_call>'
    for text in ("", "Hello, {you}!\n", rome, f"Well. {rome}\n{loose} Done.", f"{loose}{rome}{rome}"):
        assert fits(thought + text)
    broken = (rome.replace("Rome", "Oslo"), rome.replace("weather", "wether"), rome[:-3], rome.replace("city", "town"))
    for text in (*broken, "<tool_call>", "<tool_call>weather", f"Well. {rome} and {broken[0]}"):
        assert not fits(thought + text)
    assert not fits("> no end")
    assert fits("> no end</think> <tool_cal")


def test_styles_whose_calls_have_no_mark():
    marked = [name for name, style in TOOL_STYLES.items() if answer_grammar(TOOLS.values(), style) is not None]
    assert marked == ["xml", "g1k"]
