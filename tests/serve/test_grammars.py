"""Texts that have the form that a client asks for."""

from __future__ import annotations

import json
import re

import openai
import pytest

pytest.importorskip("llguidance")

ASK = {"model": "bundled", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 80, "seed": 1}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}


def test_a_schema(client, llm):
    found = client.chat.completions.create(**ASK, response_format=SCHEMA, n=2)
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content)) == {"name", "age"}
    assert found.choices[0].message.content == llm.chat(ASK["messages"], 80, seed=1, schema=PERSON).text
    chunks = client.chat.completions.create(**ASK, response_format=SCHEMA, stream=True)
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == found.choices[0].message.content


def test_pydantic_and_the_clients_own_parser(client):
    from pydantic import BaseModel, ConfigDict, Field

    class Person(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: str = Field(max_length=6)
        age: int = Field(ge=0, le=99)

    found = client.chat.completions.parse(**ASK, response_format=Person)
    assert isinstance(found.choices[0].message.parsed, Person)


def test_any_object(client):
    options = ASK | {"max_tokens": 400, "logit_bias": {str(token): 30 for token in (94, 1)}}
    found = client.chat.completions.create(**options, response_format={"type": "json_object"})
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}}, r'\{"name":"[^ ]*.*","age":\d+\}'),
        ({"structured_outputs": {"json": PERSON, "whitespace_pattern": "~"}}, r'\{~?"name"~?:.*\}'),
        ({"structured_outputs": {"regex": "(ab|cd){2}"}}, "(ab|cd){2}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}}, r"a\d"),
        ({"guided_json": json.dumps(PERSON)}, r"\{.*\}"),
        ({"guided_regex": "x[0-9]"}, r"x\d"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "a" /[0-9]/'}, r"a\d"),
        ({"grammar": 'root ::= "a" [0-9]'}, r"a\d"),
        ({"response_format": {"type": "json_object", "schema": PERSON}}, r"\{.*\}"),
    ],
)
def test_names_of_others(client, body, pattern):
    answer = client.chat.completions.create(**ASK, extra_body=body).choices[0]
    assert re.fullmatch(pattern, answer.message.content)
    text = client.completions.create(model="bundled", prompt="Once", max_tokens=80, seed=1, extra_body=body).choices[0]
    assert re.fullmatch(pattern, text.text.strip())
    assert answer.finish_reason == text.finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema needs a schema"),
        ({"structured_outputs": {"json": {"not": {}}}}, 'schema: Unimplemented keys: ["not"]'),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "give one of regex and choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag is not served here"),
        ({"grammar": "root ::= foo"}, "grammar: Rule 'foo' not found"),
        ({"grammar": "start: /a/", "guided_regex": "a"}, "give one of grammar and guided_regex"),
        ({"guided_regex": "a" * 70000}, "regex has 70,000 characters; at most 65,536 are taken"),
        ({"guided_choice": []}, "choices must be a list of texts, none of them empty, got []"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_form(client, body, message, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, extra_body=body, stream=stream)
    assert caught.value.body["message"] == message


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in (("weather", WEATHER), ("forecast", WEATHER))
]


@pytest.mark.parametrize("style", ["json", "list", "xml", "g1k", "function_calling"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "forecast"}}])
def test_a_call_that_must_be(client, choice, style):
    options = ASK | {"tools": TOOLS, "tool_choice": choice, "extra_body": {"tool_style": style}}
    [found] = client.chat.completions.create(**options).choices
    assert found.finish_reason == "tool_calls"
    [call] = found.message.tool_calls
    assert call.function.name in ("weather", "forecast") if choice == "required" else ("forecast",)
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    assert not found.message.content


@pytest.mark.parametrize("style", ["xml", "g1k"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_call_that_may_be(client, style, strict):
    """Once it has begun, a strict tool can only be called as its schema has it."""
    tools = [{"type": "function", "function": tool["function"] | {"strict": strict}} for tool in TOOLS]
    body = {"tool_style": style, "opening": ' Well. <tool_call>{"name":"forecast",'}
    [found] = client.chat.completions.create(**ASK, tools=tools, extra_body=body).choices
    if not strict:
        assert not found.message.tool_calls
        return
    assert found.message.content.startswith("Well.")
    [call] = found.message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city", "days"}


def test_a_form_beside_tools(client):
    """The form is that of the answer."""
    options = ASK | {"tools": TOOLS, "extra_body": {"tool_style": "json"}}
    [found] = client.chat.completions.create(**options, response_format=SCHEMA).choices
    assert set(json.loads(found.message.content)) == {"name", "age"}


def test_what_would_cost_too_much(client):
    """It ends with an error; others go on."""
    doubling = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**ASK, extra_body={"grammar": doubling})
    assert caught.value.status_code == 400
    assert caught.value.body["message"].startswith("the grammar cannot be followed any further: ")
    assert client.chat.completions.create(**ASK).usage.completion_tokens
