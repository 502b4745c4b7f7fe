"""From the text of an answer to its thought, what is said, and calls."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry.text.tool_calls import AnswerParser, Parsed, parse

DATA = json.loads((Path(__file__).parent / "fixtures" / "serving-toolcalls.json").read_text(encoding="utf-8"))
TOOLS = DATA["tools"]


def in_pieces(text: str, cuts: list[int], **options) -> Parsed:
    """The parts of an answer that comes in pieces, which end at `cuts`."""
    parser = AnswerParser(TOOLS, **options)
    ends = [0, *sorted(cuts), len(text)]
    parts = [parser.feed(text[a:b]) for a, b in pairwise(ends)] + [parser.finish()]
    calls = [call for part in parts for call in part.calls]
    return Parsed("".join(part.reasoning for part in parts), "".join(part.content for part in parts), calls)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
@pytest.mark.parametrize("row", DATA["rows"], ids=lambda row: str(row["no"]))
def test_answers_as_they_are_known(row, size):
    text, opening = row["text"], row["opening"]
    parsed = in_pieces(text, [*range(size, len(text), size)], opening=opening)
    assert parsed == parse(text, TOOLS, opening=opening)
    assert (parsed.reasoning, parsed.content) == (row["reasoning"], row["content"])
    assert [[call.name, call.arguments] for call in parsed.calls] == row["calls"]
    assert all(len(call.id) == 29 and call.id.startswith("call_") for call in parsed.calls)


PING = '{"name":"ping"}'
PARTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_calls>",
    "**Tool Call:**",
    "```",
    "```json",
    "```py",
    "\n",
    " ",
    "`",
    "<",
]
PARTS += [
    "<think",
    ">",
    "</think>",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "\\",
    ",",
    "a",
    PING,
    "{'name': 'ping'}",
    f"[{PING}]",
]
PARTS += ['{"name":"search","arguments":{"q":"</tool_call>\n```"}}', '{"name":"no_tool","arguments":{"reason":"No."}}']
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.integers(0, 100), max_size=6), st.sampled_from([(), ("a", "\n\n")]))
def test_the_cuts_change_nothing(opening, text, cuts, stops):
    options = {"opening": opening, "stops": stops}
    whole = in_pieces(text, [], **options)
    assert in_pieces(text, [min(cut, len(text)) for cut in cuts], **options) == whole
    assert in_pieces(text, [*range(1, len(text))], **options) == whole
    assert whole.reasoning == whole.reasoning.strip()
    assert whole.content == whole.content.strip()
    if not stops:
        assert parse(text, TOOLS, opening=opening) == whole
        assert parse(opening + text, TOOLS) == whole
        assert parse(opening + text).calls == []


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_what_the_caller_has_written_is_not_handed_out(beginning, text):
    beginning = f"x{beginning}x"
    whole, rest = parse(beginning + text, TOOLS), in_pieces(text, [], beginning=beginning)
    written = len(in_pieces("", [], opening=beginning).calls)
    if not whole.calls:
        assert beginning + rest.content == whole.content or "no_tool" in whole.content + beginning + text
    assert rest.calls == whole.calls[-len(rest.calls) :] or not rest.calls
    assert len(whole.calls) - written <= len(rest.calls) <= len(whole.calls)
    beginning = beginning.replace("</think>", "")
    thought = in_pieces(f"{text}</think>Yes", [], opening=" <think", beginning=f">{beginning}")
    assert (beginning + thought.reasoning).strip() == parse(f"<think>{beginning}{text}</think>").reasoning


class CountingParser(AnswerParser):
    """Counts how often a character is read."""

    steps = 0

    def _say(self, text):
        self.steps += len(text)
        super()._say(text)

    def _of_block(self, c):
        self.steps += 1
        return super()._of_block(c)


def assert_linear(unit: str, opening: str = "") -> None:
    text = (unit * (4000 // len(unit) + 1))[:4000]
    parser = CountingParser(TOOLS, opening=opening)
    for c in text:
        parser.feed(c)
    parser.finish()
    assert parser.steps <= 5 * (len(opening) + len(text))


ENDLESS = [
    "<tool_call>[",
    "<tool_call>{",
    '<tool_call>["',
    "<tool_call>['<tool_call>[\"",
    '<tool_call>["\',"',
    "```json\n{\n",
    '```json\n["\n',
    "```json\n['```json\n[\"\n",
    "[",
    "<",
    "`",
    "```",
    " ",
    "*",
    "**Tool Call:**\n",
    "**Tool Call:**  ",
    "{'a':'<tool_call>",
]


@pytest.mark.parametrize("unit", [*ENDLESS, f"```json\n{PING}x\n", f"<tool_call>{PING}"])
def test_marks_that_are_never_closed_take_linear_time(unit):
    for opening in ("", "{", "{'a': '", '["', " <think", "```json\n[", "```py\n"):
        assert_linear(unit, opening)


@settings(max_examples=40, deadline=None)
@given(TEXTS.filter(len))
def test_any_text_takes_linear_time(unit):
    assert_linear(unit)


@pytest.mark.parametrize("unit", ["A heron stands. ", "<tool_call>[", '```json\n{"a": "<tool_call>{\'\n'])
def test_a_long_answer_comes_in_single_characters(unit):
    parser = AnswerParser(TOOLS, opening=' <tool_call>["')
    start = time.perf_counter()
    for c in unit * (100_000 // len(unit)):
        parser.feed(c)
    parser.finish()
    assert time.perf_counter() - start < 20  # it takes about one second; quadratic time would be minutes


def test_deltas_are_as_they_are_certain():
    """White space and what may be a mark are held, a call comes in one piece."""
    parser = AnswerParser(TOOLS)
    pieces = [" I will lo", "ok.\n<tool", f"_call>{PING[:-1]}", "}</tool_call>", " Done."]
    parts = [*map(parser.feed, pieces), parser.finish()]
    assert [(part.content, [call.name for call in part.calls]) for part in parts] == [
        ("I will lo", []),
        ("ok.", []),
        ("", []),
        ("", ["ping"]),
        ("", []),
        ("", []),
    ]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        # other shapes of calls (R6)
        (f"[{PING},{PING}]", "", ["ping", "ping"]),
        (f"{PING} and", f"{PING} and", []),
        ('<tool_call>{"name":"ping","arguments":null}', "", ["ping"]),
        ('<tool_call>{"name":"ping","arguments":""}', "", ["ping"]),
        ('<tool_call>{"name":"search","parameters":"{\\"q\\":\\"x\\"}"}', "", ["search"]),
        ('<tool_call>{"name":"ping","arguments":[]}', '<tool_call>{"name":"ping","arguments":[]}', []),
        # numbers that JSON does not know (R5)
        *(
            (text := f'<tool_call>{{"name":"search","arguments":{{"q":{number}}}}}</tool_call>', text, [])
            for number in ("NaN", "Infinity", "1e999", "(1,)", "{1: 2}")
        ),
        # fences (R3, R10)
        (f"```json\n{PING}", "", ["ping"]),
        (f"```\n{PING}\n```", "", ["ping"]),
        (f"```json\n{PING}\n{PING}\n```", f"```json\n{PING}\n{PING}\n```", []),
        (f"```json\n{PING} as", "", ["ping"]),
        (f"See ```json\n{PING}\n```", f"See ```json\n{PING}\n```", []),
        (f"```py```\n<tool_call>{PING}", "```py```", ["ping"]),
        (f"```py\n```\n<tool_call>{PING}", "```py\n```", ["ping"]),
        (f"```py\n```json\n{PING}\n```", f"```py\n```json\n{PING}\n```", []),
        (f"Now:\n**Tool Call:**\n```json\n{PING}\n```", "Now:", ["ping"]),
        (f"Now: **Tool Call:**\n```json\n{PING}\n```", "Now: **Tool Call:**", ["ping"]),
        ("**Tool Call:**\nnone", "**Tool Call:**\nnone", []),
        ("a\n**Tool Call:**\n ", "a\n**Tool Call:**", []),
        # G1k's way to say that it needs none
        ('<tool_call>{"name":"no_tool","arguments":{"reason":"It rains."}}</tool_call> x', "It rains.", []),
    ],
)
def test_what_is_a_call(text, content, calls):
    parsed = parse(text, TOOLS)
    assert (parsed.content, [call.name for call in parsed.calls]) == (content, calls)


def test_nulls_that_mean_nothing_is_given():
    """They are dropped where an argument need not be given and takes no null."""
    schemas = {
        "a": {"type": "integer"},
        "b": {"type": ["integer", "null"]},
        "c": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "d": {"enum": ["x", "y"]},
        "e": {},
        "f": {"type": "string"},
    }
    tools = {"f": {"properties": schemas, "required": ["f"]}}
    arguments = dict.fromkeys([*schemas, "other"])
    [call] = parse(f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}", tools).calls
    assert list(json.loads(call.arguments)) == ["b", "c", "e", "f", "other"]


def test_halves_of_surrogate_pairs_can_be_sent():
    [call] = parse('<tool_call>{"name":"search","arguments":{"q":"\\ud83d é"}}', TOOLS).calls
    assert call.arguments.encode() == b'{"q":"\\ud83d \\u00e9"}'


def test_stops_count_in_what_is_said_alone():
    text = f">Say STOP.</think>Yes, no STOP <tool_call>{PING}"
    parsed = in_pieces(text, [], opening=" <think", stops=["STOP"])
    assert parsed == ("Say STOP.", "Yes, no", [])
    call = '<tool_call>{"name":"search","arguments":{"q":"STOP"}}</tool_call>'
    parsed = in_pieces(f"Hm. ST{call}", [], stops=["STOP", "</tool_call>"])
    assert (parsed.content, len(parsed.calls)) == ("Hm. ST", 1)
    parser = AnswerParser(TOOLS, stops=["\n"])
    parser.feed("a")
    assert not parser.stopped
    parser.feed(" \n")
    assert parser.stopped  # though white space at the end is never handed out


def test_where_one_call_ends():
    for text in (f"<tool_call>{PING}</tool_call>", f"```json\n{PING}\n```", f"**Tool Call:**\n```json\n{PING}\n```"):
        parser = AnswerParser(TOOLS)
        parser.feed(text[:-1])
        assert not parser.has_called
        parser.feed(text[-1])
        assert parser.has_called


def test_who_thinks():
    parser = AnswerParser(TOOLS, opening=" <think")
    assert parser.is_thinking
    assert parser.feed(">Hm").reasoning == "Hm"
    assert parser.feed(" </thi").reasoning == ""
    assert parser.is_thinking
    parser.feed("nk>")
    assert not parser.is_thinking
    assert parse("<think>Never ending </thin", TOOLS).reasoning == "Never ending </thin"
