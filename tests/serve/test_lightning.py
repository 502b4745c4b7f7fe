"""The routes of rwkv_lightning."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sse import events

from heronry.engine.presets import PRESETS
from heronry.serve import lightning
from heronry.text.chat_templates import fill_in_middle, render
from heronry.text.templates import G1

JSON = {"content-type": "application/json"}
BODY = {
    "model": "rwkv7",
    "contents": ["User: hi\n\nAssistant:", "The sky is"],
    "max_tokens": 24,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.3,
    "alpha_presence": 2.0,
    "alpha_frequency": 0.2,
    "alpha_decay": 0.996,
    "stop_tokens": [0, 24281],
    "stream": False,
    "chunk_size": 8,
    "state_id": None,
}


def ask(client, path: str, body: dict) -> dict:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def written(llm, texts: list[str], max_tokens: int, **options) -> list:
    """What the engine writes after raw texts, seeded one after another."""
    encode = llm.tokenizer.encode
    return [
        llm.generate(encode(text), max_tokens, **{"sampling": "lightning", "seed": 7 + i, **options})
        for i, text in enumerate(texts)
    ]


def test_a_batch(world, world_llm):
    found = ask(world, "/v1/batch/completions", BODY | {"seed": 7})
    expected = written(world_llm, BODY["contents"], 24, stop_token_ids=[0, 24281])
    assert found["choices"] == [
        {"index": i, "message": {"role": "assistant", "content": x.text}, "finish_reason": x.finish_reason}
        for i, x in enumerate(expected)
    ]
    assert (found["id"], found["object"], found["model"]) == ("rwkv7-fast-batch", "chat.completion", "tiny")
    read = sum(len(world_llm.tokenizer.encode(text)) for text in BODY["contents"])
    count = sum(x.usage.completion_tokens for x in expected)
    assert found["usage"] == {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}


def test_why_it_stops(http, llm):
    plain = llm.generate(llm.tokenizer.encode("The dog"), 12, temperature=0)
    [was] = llm.tokenizer.encode(" was")
    body = {"contents": ["The dog"], "max_tokens": 12, "temperature": 0, "alpha_presence": 0, "alpha_frequency": 0}
    [whole] = ask(http, "/v1/batch/completions", body | {"stop_tokens": []})["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (plain.text, "length")
    for stop in (was, " was"):
        [cut] = ask(http, "/v1/batch/completions", body | {"stop_tokens": [stop]})["choices"]
        assert (cut["message"]["content"], cut["finish_reason"]) == (plain.text.partition(" was")[0], "stop")
        assert cut["message"]["content"] != plain.text
    usual = ask(http, "/v1/batch/completions", {"contents": ["The dog"], "max_tokens": 5, "seed": 7})
    assert usual["choices"][0]["message"]["content"] == written(llm, ["The dog"], 5)[0].text


def test_without_stop_tokens_the_template_stops_it(world, world_llm, monkeypatch):
    """Its own default, 0, 261 and 24281, cut at every empty line, and left answers empty."""
    [plain] = written(world_llm, ["The sky is"], 12)
    stop = plain.text[len(plain.text) // 2 :][:3]
    monkeypatch.setattr(world_llm, "chat_template", replace(G1, stops=(stop,)))
    body = {"contents": ["The sky is"], "max_tokens": 12, "seed": 7}
    [choice] = ask(world, "/v1/batch/completions", body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (plain.text.partition(stop)[0], "stop")
    [choice] = ask(world, "/v1/batch/completions", body | {"stop_tokens": [0]})["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (plain.text, plain.finish_reason)


def test_a_stream_is_the_whole(world):
    body = BODY | {"seed": 7, "chunk_size": 5}
    whole = ask(world, "/v1/batch/completions", body)
    *parts, done = events(world.post("/v1/batch/completions", json=body | {"stream": True}))
    assert done == "[DONE]"
    texts, counts = ["", ""], [0, 0]
    for part in parts:
        assert part["object"] == "chat.completion.chunk"
        [choice] = part["choices"]
        i = choice["index"]
        texts[i] += choice["delta"].get("content", "")
        counts[i] += 1
        if choice["delta"] == {}:
            assert choice["finish_reason"] == whole["choices"][i]["finish_reason"]
        else:
            assert choice.keys() == {"index", "delta"}
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert max(counts) <= 24 // 5 + 2
    assert [part["usage"] for part in parts if "usage" in part] == [whole["usage"]]
    again = events(world.post("/big_batch/completions", json=body))
    assert again[-1] == "[DONE]"
    assert "".join(x["choices"][0]["delta"].get("content", "") for x in again[:-1]) != ""


def test_translation(world, world_llm, monkeypatch):
    assert lightning.MOST_TRANSLATED == 2048
    monkeypatch.setattr(lightning, "MOST_TRANSLATED", 40)
    body = {"source_lang": "English", "target_lang": "Chinese", "text_list": ["Good day", "Thanks"]}
    reply = ask(world, "/translate/v1/batch-translate", body)
    found = reply["translations"]
    prompts = ["English: Good day\n\nChinese:", "English: Thanks\n\nChinese:"]
    expected = written(world_llm, prompts, 40, sampling=None, temperature=0)
    assert found == [{"detected_source_lang": "English", "text": x.text} for x in expected]
    assert reply["usage"]["completion_tokens"] == sum(x.usage.completion_tokens for x in expected)


def test_code_with_a_gap(world, world_llm, http):
    body = {"prefix": ["def f("], "suffix": ["\n    return x"], "max_tokens": 6, "seed": 7}
    found = ask(world, "/FIM/v1/batch-FIM", body)
    [expected] = written(world_llm, [fill_in_middle("def f(", "\n    return x")], 6)
    assert (found["object"], found["choices"][0]["message"]["content"]) == ("FIM.completion", expected.text)
    streamed = events(world.post("/FIM/v1/batch-FIM", json=body | {"stream": True}))
    assert "".join(x["choices"][0]["delta"].get("content", "") for x in streamed[:-1]) == expected.text
    reply = world.post("/FIM/v1/batch-FIM", json=body | {"suffix": []})
    assert (reply.status_code, reply.json()) == (400, {"error": "suffix: there are 1 prefixes and 0 suffixes"})
    assert "cannot fill in the middle" in http.post("/FIM/v1/batch-FIM", json=body).json()["error"]


def test_counts_and_status(http, llm):
    def count(**body) -> int:
        return ask(http, "/v1/tokens/count", body)["tokens"]

    def tokens(text: str) -> int:
        return len(llm.tokenizer.encode(text))

    assert count(text="A dog ran") == tokens("A dog ran")
    assert count(contents=["A dog", "ran"]) == tokens("A dog") + tokens("ran")
    messages = [{"role": "user", "content": "Hello"}]
    assert count(messages=messages) == tokens(render(messages, "story"))
    assert http.post("/v1/tokens/count", json={}).json() == {"error": "Missing text or messages"}
    status = http.get("/v1/server/status").json()
    assert (status["status"], status["model"]) == ("running", {"id": "bundled", "loaded": True})


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/batch/completions", {"contents": []}, "Empty prompts list"),
        ("/translate/v1/batch-translate", {"target_lang": "French", "text_list": []}, "Empty prompts list"),
        ("/v1/batch/completions", {}, "contents: Field required"),
        ("/v1/batch/completions", {"contents": [""]}, "the prompt is empty"),
        ("/v1/batch/completions", {"contents": ["a"], "temperature": -1}, "temperature: Input should be greater"),
        ("/v1/batch/completions", {"contents": ["a"], "stop_tokens": [70000]}, "must be below 2048"),
        ("/v1/batch/completions", {"contents": ["a"], "model": "gpt"}, "model: there is no model 'gpt' here"),
    ],
)
def test_errors_are_texts(http, path, body, message):
    reply = http.post(path, json=body)
    assert reply.status_code == (404 if "model" in body else 400)
    assert reply.json().keys() == {"error"}
    assert message in reply.json()["error"]


def test_too_many_contents(http):
    reply = http.post("/v1/batch/completions", json={"contents": ["a"] * 257, "max_tokens": 1})
    error = {"error": "bsz overflow, Max bsz=256", "request_bsz": 257, "max_bsz": 256}
    assert (reply.status_code, reply.json()) == (400, error)


def test_the_key_may_stand_in_the_body(world):
    body = BODY | {"max_tokens": 1}
    wrong = {"error": "Unauthorized: invalid or missing password"}
    nobody = {"authorization": ""}
    for given in ({}, {"password": "wrong"}, {"password": 5}, {"password": None}):
        reply = world.post("/v1/batch/completions", json=body | given, headers=nobody)
        assert (reply.status_code, reply.json()) == (401, wrong)
    reply = world.post("/v1/batch/completions", content=b'{"password": "\\ud800"}', headers=nobody | JSON)
    assert (reply.status_code, reply.json()) == (401, wrong)
    assert world.post("/v1/batch/completions", content=b"[", headers=nobody | JSON).status_code == 400
    assert world.post("/v1/batch/completions", json={"password": "x"}, headers=nobody).json() == wrong
    reply = world.post("/v1/batch/completions", json=body | {"password": "key-of-bob"}, headers=nobody)
    assert reply.status_code == 200
    reply = world.post("/v1/batch/completions", json=body, headers={"authorization": "Bearer wrong"})
    assert (reply.status_code, reply.json()) == (401, {"error": "the API key is wrong"})
    assert world.get("/v1/server/status", headers=nobody).status_code == 401
    assert world.post("/v1/completions", json={"prompt": "a", "password": "key-of-bob"}, headers=nobody).json()[
        "error"
    ]["type"] == ("authentication_error")


def test_the_preset_is_its_own():
    usual = PRESETS["lightning"]
    penalties = (usual.presence_penalty, usual.frequency_penalty, usual.penalty_decay)
    assert (usual.temperature, usual.top_k, usual.top_p, penalties) == (1, 20, 0.3, (2, 0.2, 0.996))
