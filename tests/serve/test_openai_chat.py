"""/v1/chat/completions, by the official client."""

from __future__ import annotations

import openai
import pytest

ASK = [{"role": "user", "content": "Tell me a story about a dog."}]
GREEDY = {"model": "bundled", "temperature": 0, "messages": ASK}


def test_the_answer_is_that_of_the_engine(client, llm):
    found = client.chat.completions.create(**GREEDY, max_completion_tokens=30)
    expected = llm.chat(ASK, 30, temperature=0)
    [choice] = found.choices
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.tool_calls is None
    assert found.usage.completion_tokens == 30
    assert found.usage.total_tokens == found.usage.prompt_tokens + 30
    assert found.usage.completion_tokens_details.reasoning_tokens == 0
    assert found.object == "chat.completion"


def test_sampling_is_that_of_the_template_unless_it_is_given(client, llm):
    options = {"model": "bundled", "messages": ASK, "seed": 3}
    found = client.chat.completions.create(**options, max_tokens=20)
    assert found.choices[0].message.content == llm.chat(ASK, 20, seed=3).text
    hot = client.chat.completions.create(**options, max_tokens=20, temperature=2)
    assert hot.choices[0].message.content == llm.chat(ASK, 20, seed=3, temperature=2).text
    preset = client.chat.completions.create(**options, max_tokens=20, extra_body={"preset": "creative"})
    assert preset.choices[0].message.content == llm.chat(ASK, 20, seed=3, sampling="creative").text


def test_a_stream_is_the_whole(client):
    options = {"model": "bundled", "messages": ASK, "max_tokens": 25, "n": 2, "seed": 5}
    options |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1]
    roles = [chunk.choices[0].delta.role for chunk in chunks[:-1]]
    assert roles.count("assistant") == 2
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(x.delta.content or "" for x in mine) == choice.message.content
        assert [x.finish_reason for x in mine if x.finish_reason] == [choice.finish_reason]
        entries = [entry for x in mine if x.logprobs for entry in x.logprobs.content]
        assert entries == choice.logprobs.content
        for entry in entries:
            assert bytes(entry.bytes).decode(errors="replace") == entry.token or entry.token.startswith("bytes:")
            assert entry.logprob <= entry.top_logprobs[0].logprob
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_clients_own_stream_helper(client):
    options = {"model": "bundled", "messages": ASK, "max_tokens": 60, "seed": 5, "stop": ["."]}
    with client.chat.completions.stream(**options) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        found = stream.get_final_completion()
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.content == "".join(deltas)
    assert found.choices[0].message.content == client.chat.completions.create(**options).choices[0].message.content


def test_stops(client):
    plain = client.chat.completions.create(**GREEDY, max_tokens=40).choices[0].message.content
    word = plain.split()[3]
    found = client.chat.completions.create(**GREEDY, max_tokens=40, stop=[f" {word}"])
    assert found.choices[0].message.content == plain.partition(f" {word}")[0].rstrip()
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 40
    streamed = list(client.chat.completions.create(**GREEDY, max_tokens=40, stop=[f" {word}"], stream=True))
    assert "".join(x.choices[0].delta.content or "" for x in streamed) == found.choices[0].message.content
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_an_answer_that_is_begun(client, llm):
    begun = [*ASK, {"role": "assistant", "content": "The dog"}]
    found = client.chat.completions.create(model="bundled", temperature=0, messages=begun, max_tokens=9)
    assert found.choices[0].message.content == llm.chat(begun, 9, temperature=0).text


def test_messages_of_all_kinds(client):
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Tell me more."},
    ]
    found = client.chat.completions.create(model="bundled", messages=messages, max_tokens=5)
    assert found.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "there are no messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.[0].role", "role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.[0].content", "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.[0].content.[0].type", ""),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "must be one of none, minimal"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"modalities": ["audio"]}, "modalities", "only text"),
        ({"extra_body": {"preset": "hottest"}}, "preset", "unknown sampling preset"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message", "a last message of the assistant"),
    ],
)
def test_bad_requests(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(**({"model": "bundled", "messages": ASK, "max_tokens": 2} | fields))
    assert error.value.body["param"] == param
    assert error.value.body["type"] == "invalid_request_error"
