"""What RWKV-Runner's clients ask for."""

from __future__ import annotations

import openai

PROMPT = "Once upon a time"


def test_status(server, http):
    assert http.get("/status").json() == {"status": "Working", "pid": server.process.pid, "device_name": "CPU"}


def test_routes_without_v1(server, client):
    body = {"model": "bundled", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as short:
        assert short.models.list().data == client.models.list().data
        found = short.completions.create(**body)
        assert found.choices == client.completions.create(**body).choices
        *chunks, last = short.completions.create(**body, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text
        assert last.usage == found.usage
        ask = {"model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1}
        assert short.chat.completions.create(**ask).choices == client.chat.completions.create(**ask).choices


def test_llama_cpp_has_a_route_of_the_same_name(http):
    body = {"prompt": PROMPT, "n_predict": 8, "temperature": 0}
    found, same = (http.post(path, json=body).json() for path in ("/completions", "/completion"))
    assert found["content"] == same["content"] != ""
    assert found["stop_type"] == "limit"


def test_errors(http):
    reply = http.post("/completions", json={"prompt": PROMPT, "max_tokens": -1})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "max_tokens"
    reply = http.post("/completions", json={"prompt": PROMPT, "n_predict": "many"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n_predict")
    assert http.post("/completions", json=[]).status_code == 400
    body = b'{"prompt": "a", "n_predict": 1, "stop": "\\ud800"}'
    for path, message in (("/completion", "lone surrogate"), ("/completions", "the body is not JSON")):
        reply = http.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]
