"""/v1/responses, by the official client: each response is a state that others may follow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

ASK, NEXT, OTHER = "Tell me a story about a dog.", "What happened then?", "And a cat?"
GREEDY = {"model": "bundled", "temperature": 0, "max_output_tokens": 24}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}


def conversation(llm, *messages: str) -> list[str]:
    """The answers of the engine's own conversation, which goes on from its states too."""
    chat = llm.chat()
    return [chat.say(message, 24, temperature=0).text for message in messages]


def test_an_answer(client, llm):
    found = client.responses.create(**GREEDY, input=ASK)
    assert [found.output_text] == conversation(llm, ASK)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.output_tokens == 24
    assert found.usage.total_tokens == found.usage.input_tokens + 24
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    [item] = found.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == (
        "message",
        "assistant",
        "incomplete",
        [],
    )
    assert found.id.startswith("resp_")
    assert client.responses.retrieve(found.id) == found
    counted = client.responses.input_tokens.count(model="bundled", input=ASK)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", found.usage.input_tokens)


def test_a_kept_state_is_followed_and_branches(client, llm):
    first = client.responses.create(**GREEDY, input=ASK)
    for message in (NEXT, OTHER, NEXT):
        second = client.responses.create(**GREEDY, input=message, previous_response_id=first.id)
        assert [first.output_text, second.output_text] == conversation(llm, ASK, message)
        read = second.usage.input_tokens - second.usage.input_tokens_details.cached_tokens
        # the state has read the answer to its last token
        assert second.usage.input_tokens_details.cached_tokens == first.usage.input_tokens + 24
        assert read == len(llm.tokenizer.encode(f"\n\nUser: {message}\n\nAssistant:"))
        third = client.responses.create(**GREEDY, input=ASK, previous_response_id=second.id)
        assert third.output_text == conversation(llm, ASK, message, ASK)[2]
    counted = client.responses.input_tokens.count(model="bundled", input=NEXT, previous_response_id=first.id)
    assert counted.input_tokens == second.usage.input_tokens
    items = client.responses.input_items.list(third.id, order="asc").data
    assert [item.content[0].text for item in items] == [ASK, first.output_text, NEXT, second.output_text, ASK]
    page = client.responses.input_items.list(third.id, limit=2)
    assert [item.id for item in page.data] == [items[4].id, items[3].id]
    assert page.has_more
    assert [item.id for item in page] == [item.id for item in items[::-1]]


def test_many_branches_at_once(client):
    """What a branch says does not depend on the others."""
    first = client.responses.create(**GREEDY, input=ASK)
    questions = [f"What did {name} say?" for name in ("Tim", "Sue", "Ann", "Bob", "Max", "Lily")]

    def follow(question: str) -> str:
        return client.responses.create(**GREEDY, input=question, previous_response_id=first.id).output_text

    alone = [follow(question) for question in questions]
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(follow, questions)] == alone


def test_a_stop_string_is_not_in_the_state(client, llm):
    """An answer that ends by itself: the state is that in front of the next turn, whatever was read to see the end."""
    options = GREEDY | {"max_output_tokens": 400}
    first = client.responses.create(**options, input=ASK)
    chat = llm.chat()
    assert first.output_text == chat.say(ASK, 400, temperature=0).text
    assert (first.status, first.incomplete_details) == ("completed", None)
    second = client.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id)
    assert second.output_text == chat.say(NEXT, 24, temperature=0).text


def test_a_stream_is_the_whole(client):
    options = GREEDY | {"input": ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    head = ["created", "in_progress", "output_item.added", "content_part.added"]
    tail = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert (kinds[:4], kinds[-4:]) == (head, tail)
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = events[4:-4]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-4].text
    last = events[-1].response
    assert last.output[0].content == whole.output[0].content
    assert last.usage == whole.usage
    assert {event.response.id for event in (*events[:2], events[-1])} == {last.id}
    assert [x.token for event in deltas for x in event.logprobs] == [
        x.token for x in last.output[0].content[0].logprobs
    ]
    assert client.responses.retrieve(last.id) == last


def test_the_clients_own_stream_helper(client):
    with client.responses.stream(**GREEDY | {"max_output_tokens": 400}, input=ASK) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        found = stream.get_final_response()
    assert found.output_text == text
    followed = client.responses.create(**GREEDY, input=NEXT, previous_response_id=found.id)
    assert followed.usage.input_tokens_details.cached_tokens > found.usage.input_tokens


def test_instructions_are_not_inherited(client):
    """They stand in front of everything: with others the state is of no use, and the items are read again."""
    first = client.responses.create(**GREEDY, input=ASK, instructions="Be brief.")
    same = client.responses.create(**GREEDY, input=NEXT, instructions="Be brief.", previous_response_id=first.id)
    assert same.usage.input_tokens_details.cached_tokens == first.usage.input_tokens + 24
    for instructions in (None, "Be kind."):
        other = client.responses.create(**GREEDY, input=NEXT, instructions=instructions, previous_response_id=first.id)
        assert other.usage.input_tokens_details.cached_tokens == 0
        said = [{"role": "system", "content": instructions}] if instructions else []
        said += [{"role": "user", "content": ASK}, {"role": "assistant", "content": first.output_text}]
        said.append({"role": "user", "content": NEXT})
        whole = client.chat.completions.create(model="bundled", temperature=0, max_tokens=24, messages=said)
        assert other.output_text == whole.choices[0].message.content
        assert other.instructions == instructions


def test_an_answer_that_is_begun(client):
    """It goes on, and is whole in what follows, with its state and without."""
    begun = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "The dog"}]
    first = client.responses.create(**GREEDY, input=begun)
    whole = client.chat.completions.create(model="bundled", temperature=0, max_tokens=24, messages=begun)
    assert first.output_text == whole.choices[0].message.content
    options = GREEDY | {"input": NEXT, "previous_response_id": first.id}
    second = client.responses.create(**options)
    assert second.usage.input_tokens_details.cached_tokens == first.usage.input_tokens + 24
    texts = [item.content for item in client.responses.input_items.list(second.id, order="asc")]
    assert ["".join(part.text for part in parts) for parts in texts] == [ASK, f"The dog{first.output_text}", NEXT]
    again = client.responses.create(**options, instructions="Be kind.")
    said = [{"role": "system", "content": "Be kind."}, begun[0]]
    said += [
        {"role": "assistant", "content": f"The dog{first.output_text}"},
        {"role": "user", "content": NEXT},
    ]
    whole = client.chat.completions.create(model="bundled", temperature=0, max_tokens=24, messages=said)
    assert again.output_text == whole.choices[0].message.content


CALL = '```json\n{"name":"weather","arguments":{"city":"Paris"}}\n```'


def ask_tool(client, **options):
    """The bundled model calls nothing by itself: a form of its answer makes it."""
    forced = {"extra_body": {"structured_outputs": {"choice": [CALL]}}}
    options = {"model": "bundled", "input": "Weather?", "tools": [TOOL], "temperature": 0} | forced | options
    return client.responses.create(**options)


def test_calls_of_tools(client):
    found = ask_tool(client)
    [call] = found.output
    assert (call.type, call.name, call.arguments, call.status) == (
        "function_call",
        "weather",
        '{"city":"Paris"}',
        "completed",
    )
    assert found.tools[0].name == "weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    options = GREEDY | {"tools": [TOOL]}
    followed = client.responses.create(**options, input=[result], previous_response_id=found.id)
    assert followed.usage.input_tokens_details.cached_tokens > found.usage.input_tokens
    # without a state the same items are read at once, to the same text
    items = [{"role": "user", "content": "Weather?"}, call.model_dump(), result]
    whole = client.responses.create(**options, input=items, store=False)
    assert whole.usage.input_tokens_details.cached_tokens < followed.usage.input_tokens_details.cached_tokens
    events = list(ask_tool(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert events[2].item.arguments == ""
    assert events[4].arguments == call.arguments


def test_one_call_is_enough(client):
    forced = {"extra_body": {"structured_outputs": {"choice": [f"{CALL}\n" * 3]}}}
    found = ask_tool(client, parallel_tool_calls=False, **forced)
    assert len(found.output) == 1
    assert found.usage.output_tokens < ask_tool(client, **forced).usage.output_tokens
    result = {"type": "function_call_output", "call_id": found.output[0].call_id, "output": "Rain."}
    options = GREEDY | {"tools": [TOOL], "input": [result], "previous_response_id": found.id}
    followed = client.responses.create(**options).usage
    # what a form forces is read in one call, which has no state within: that is read again
    assert found.usage.input_tokens <= followed.input_tokens_details.cached_tokens < found.usage.total_tokens
    assert followed.input_tokens > found.usage.total_tokens


def test_thoughts(client):
    forced = {"structured_outputs": {"choice": ["It rains."]}, "opening": " <think>Look outside.</think>"}
    forced = {"extra_body": forced}
    options = {"model": "bundled", "input": "Rain?", "reasoning": {"effort": "low"}, "temperature": 0}
    found = client.responses.create(**options, **forced)
    thought, said = found.output
    assert (thought.type, thought.summary, thought.content[0].text) == ("reasoning", [], "Look outside.")
    assert (said.content[0].text, found.output_text) == ("It rains.", "It rains.")
    assert found.reasoning.effort == "low"
    events = list(client.responses.create(**options, **forced, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    order = ["reasoning_text.delta", "reasoning_text.done", "output_text.delta", "output_text.done", "completed"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in order] == order
    followed = client.responses.create(**GREEDY, input=NEXT, previous_response_id=found.id)
    assert followed.usage.input_tokens_details.cached_tokens > found.usage.input_tokens
    endless = client.responses.create(**GREEDY, input=ASK, reasoning={"effort": "medium"})
    assert [item.type for item in endless.output] == ["reasoning"]
    assert endless.usage.output_tokens_details.reasoning_tokens == endless.usage.output_tokens == 24


def test_forms(client):
    schema = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    found = client.responses.create(model="bundled", input=ASK, text=form, temperature=0)
    assert found.output_text.replace(" ", "") == '{"n":7}'
    assert found.text.format.type == "json_schema"


def test_what_is_not_kept(client):
    found = client.responses.create(**GREEDY, input=ASK, store=False)
    assert found.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**GREEDY, input=NEXT, previous_response_id=found.id)


def test_items_by_reference(client):
    first = client.responses.create(**GREEDY, input=ASK)
    asked = [{"role": "user", "content": ASK}, {"type": "item_reference", "id": first.output[0].id}]
    asked.append({"role": "user", "content": NEXT})
    second = client.responses.create(**GREEDY, input=asked)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == [ASK, first.output_text, NEXT]
    for name in ("msg_x", first.output[0].id.replace("_0", "_1"), f"msg_{'0' * 32}_0", None):
        asked[1]["id"] = name
        with pytest.raises(openai.NotFoundError, match=r"Item with id .* not found") as error:
            client.responses.create(**GREEDY, input=asked)
        assert error.value.param == "input"


def test_unknown_and_deleted(client):
    first = client.responses.create(**GREEDY, input=ASK)
    second = client.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id)
    client.responses.delete(first.id)
    for name in (first.id, "resp_x", "..%2f..%2fetc", "a b", "x" * 300):
        with pytest.raises(openai.NotFoundError) as error:
            client.responses.create(**GREEDY, input=NEXT, previous_response_id=name)
        assert error.value.body == {
            "message": f"Previous response with id '{name}' not found.",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        }
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match=r"not found\."):
                ask(name)
    with pytest.raises(openai.BadRequestError, match="only a response with background"):
        client.responses.cancel(second.id)
    # what follows a deleted one does not need it
    third = client.responses.create(**GREEDY, input=OTHER, previous_response_id=second.id)
    assert third.usage.input_tokens_details.cached_tokens > second.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "the input is empty"),
        ({"input": []}, "input", "the input is empty"),
        ({"input": [5]}, "input.[0]", "an item must be an object"),
        ({"input": [{"role": "king", "content": "x"}]}, "input.[0].role", "the role must be user"),
        ({"input": [{"role": "user", "content": " "}]}, "input.[0].content", "the message is empty"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.[0].content.[0].type", "a part"),
        ({"input": [{"type": "computer_call"}]}, "input.[0].type", "not served here"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input.[0].call_id", "must be a text"),
        (
            {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]},
            "input.[0].tool_call_id",
            "that of an earlier call",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.[0].type", "unsupported tool type 'web_search'"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools.[0].name", "a tool must have a name"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice must be none"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"background": True}, "background", "is not served here"),
        ({"conversation": "conv_1"}, "conversation", "use previous_response_id"),
        ({"reasoning": {"effort": "huge"}}, "reasoning_effort", "must be one of none"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "needs a schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "Input should be"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ],
)
def test_bad_requests(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.responses.create(**(GREEDY | {"input": ASK} | fields))
    assert error.value.body["param"] == param
    assert error.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e999"])
@pytest.mark.parametrize("field", ["metadata", "tools"])
def test_what_no_json_can_tell_back(http, field, value):
    about = f'{{"a": {value}}}' if field == "metadata" else f'[{{"type": "function", "name": "f", "x": {value}}}]'
    body = f'{{"input": "a", "max_output_tokens": 1, "{field}": {about}}}'
    reply = http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("the body is no JSON that could be kept")
