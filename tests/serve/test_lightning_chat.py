"""What rwkv_lightning adds to /v1/chat/completions."""

from __future__ import annotations

import pytest
from sse import events

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "alpha_presence": 0, "alpha_frequency": 0, "max_tokens": 12}


def ask(client, body: dict, path: str = CHAT, status: int = 200) -> dict:
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    return reply.json()


def said(found: dict) -> list[str]:
    return [choice["message"]["content"] for choice in found["choices"]]


def test_its_fields_are_those_of_openai(http, llm):
    [was] = llm.tokenizer.encode(" was")
    theirs = {
        "alpha_presence": 0.7,
        "alpha_frequency": 0.3,
        "alpha_decay": 0.9,
        "stop_tokens": [was, "zzz"],
        "top_k": 9,
    }
    ours = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "penalty_decay": 0.9, "top_k": 9}
    ours |= {"stop_token_ids": [was], "stop": ["zzz"]}
    body = {"messages": MESSAGES, "seed": 5, "max_tokens": 30, "model": "rwkv7", "chunk_size": 1}
    found = ask(http, body | theirs | {"system": "A story."})
    system = [{"role": "system", "content": "A story."}]
    expected = ask(http, {**body, **ours, "model": "bundled", "messages": system + MESSAGES})
    assert (found["choices"], found["usage"]["completion_tokens"]) == (
        expected["choices"],
        expected["usage"]["completion_tokens"],
    )
    assert found["object"] == "chat.completion"
    both = ask(http, body | theirs | {"presence_penalty": 2})
    assert said(both) == said(ask(http, {**body, **ours, "model": None, "presence_penalty": 2}))


@pytest.mark.parametrize(
    ("name", "think"),
    [("none", "none"), ("fast", "fake"), ("free", "open"), ("en", "medium"), ("enShort", "short"), ("en_long", "long")],
)
def test_modes_of_thinking(world, name, think):
    body = {"messages": MESSAGES, "max_tokens": 6, "seed": 1}
    found, expected = (ask(world, body | more) for more in ({"think_type": name}, {"think": think}))
    assert (found["choices"], found["usage"]["prompt_tokens"]) == (
        expected["choices"],
        expected["usage"]["prompt_tokens"],
    )


def test_one_content_is_a_message(world):
    found = ask(world, {"contents": ["Hello"], "seed": 1, "max_tokens": 6})
    usual = {"preset": "lightning", "think": "fake", "seed": 1, "max_tokens": 6}
    expected = ask(world, {"messages": MESSAGES, **usual})
    assert (found["choices"], found["usage"]["prompt_tokens"]) == (
        expected["choices"],
        expected["usage"]["prompt_tokens"],
    )
    system = ask(world, {"contents": ["Hello"], "system": "Be brief.", "think": True, "seed": 1, "max_tokens": 6})
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    expected = ask(world, {"messages": messages, **usual, "think": True})
    assert system["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_other_contents_are_raw(http, llm):
    texts = ["User: hi\n\nAssistant:", "The sky is"]
    written = [
        llm.generate(llm.tokenizer.encode(text), 12, temperature=0, top_p=1, stop=llm_stops(llm)).text for text in texts
    ]
    found = ask(http, {"contents": texts, **GREEDY})
    assert (said(found), found["id"]) == (written, "rwkv7-batch")
    assert said(ask(http, {"contents": texts[:1], **GREEDY})) == written[:1]
    second = ask(http, {"contents": texts, **GREEDY}, "/v2/chat/completions")
    assert (said(second), second["id"]) == (written, "rwkv7-batch-v2")
    *parts, done = events(http.post(CHAT, json={"contents": texts, "stream": True, **GREEDY}))
    streamed = ["", ""]
    for part in parts:
        streamed[part["choices"][0]["index"]] += part["choices"][0]["delta"].get("content", "")
    assert (streamed, done) == (written, "[DONE]")
    assert parts[-1]["usage"] == found["usage"]


def llm_stops(llm) -> list[str]:
    from heronry.engine.chat import choose_template

    return list(choose_template(llm, None).stops)


def test_a_state_that_messages_go_on_from(http, llm):
    text = "User: My name is Tom\n\nAssistant: Hello Tom.\n\n"
    http.post("/v1/states", json={"text": text, "name": "tom"})
    earlier = [{"role": "user", "content": "My name is Tom"}, {"role": "assistant", "content": "Hello Tom."}]
    found = ask(http, {"messages": MESSAGES, "state_id": "tom", **GREEDY})
    expected = ask(http, {"messages": earlier + MESSAGES, **GREEDY})
    assert said(found) == said(expected)
    assert found["usage"]["prompt_tokens"] < expected["usage"]["prompt_tokens"]
    missing = ask(http, {"messages": MESSAGES, "state_id": "none"}, status=404)
    assert missing["error"]["code"] == "state_not_found"


def test_errors_have_the_shape_of_the_body(http):
    for body in ({"contents": ["a"], "temperature": -1}, {"contents": ["a", "b"], "max_tokens": -1}):
        assert ask(http, body, status=400)["error"].split(":")[0] in ("temperature", "max_tokens")
    assert ask(http, {"contents": []}, status=400) == {"error": "Empty prompts list"}
    assert ask(http, {"contents": ["a"], "model": "gpt"}, status=404)["error"].startswith("model: there is no model")
    assert ask(http, {"messages": MESSAGES, "think_type": "hard"}, status=400)["error"]["param"] == "think_type"
    assert ask(http, {"messages": MESSAGES, "stop_tokens": [""]}, status=400)["error"]["param"] == "stop_tokens"
    assert ask(http, {"messages": MESSAGES, "adapter_scale": 2}, status=400)["error"]["param"] == "adapter_scale"
    assert ask(http, {"messages": MESSAGES, "adapter_id": "x"}, status=404)["error"]["param"] == "adapter_id"
    assert ask(http, {}, status=400)["error"]["param"] == "messages"


def test_the_key_may_stand_in_the_body(world):
    nobody = {"authorization": ""}
    for body in ({"messages": MESSAGES}, {"contents": ["Hello"]}):
        found = world.post(CHAT, json={**body, "max_tokens": 1, "password": "key-of-bob"}, headers=nobody)
        assert found.status_code == 200
    wrong = world.post(CHAT, json={"contents": ["Hello"]}, headers=nobody)
    assert (wrong.status_code, wrong.json()) == (401, {"error": "Unauthorized: invalid or missing password"})
    wrong = world.post(CHAT, json={"messages": MESSAGES}, headers=nobody)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "an API key is needed" in wrong.json()["error"]["message"]


def test_other_names_of_the_routes(http):
    body = {"messages": MESSAGES, **GREEDY}
    assert ask(http, body, "/openai/v1/chat/completions")["choices"] == ask(http, body)["choices"]
    assert http.get("/openai/v1/models").json() == http.get("/v1/models").json()
