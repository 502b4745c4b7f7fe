"""What RWKV-Runner's clients ask for."""

from __future__ import annotations

import openai
import pytest

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


def test_who_speaks(http, llm):
    """user_name and assistant_name stand in the prompt, and end an answer."""
    ask = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "temperature": 0}
    found = http.post("/chat/completions", json=ask | {"user_name": "Tom", "assistant_name": "Old Frog"}).json()
    written = llm.generate("Tom: Hello\n\nOld Frog:", 20, temperature=0, stop=["\n\nTom:", "\n\nOld Frog:"])
    assert found["choices"][0]["message"]["content"] == written.text.strip()
    assert found["usage"]["prompt_tokens"] == len(llm.encode("Tom: Hello\n\nOld Frog:", begins=True))
    for name in ("", "a\nb", "{user}", "x" * 65):
        reply = http.post("/chat/completions", json=ask | {"user_name": name})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "user_name"), name
    reply = http.post("/chat/completions", json=ask | {"system_name": "Rules"})
    assert reply.status_code == 400
    assert "does not name who speaks" in reply.json()["error"]["message"]


def test_prefix(http):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The frog"}]
    ask = {"messages": messages, "max_tokens": 8, "temperature": 0}
    found = [http.post("/chat/completions", json=ask | x).json()["choices"][0]["message"] for x in (
        {"prefix": True}, {"continue_final_message": True})]  # fmt: skip
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "path", ["switch-model", "update-config", "exit", "disable-state-cache", "reset-state-cache", "enable-state-cache"]
)
def test_what_would_change_the_server(http, path):
    reply = http.post(f"/{path}", json={"model": "models/x.pth", "temperature": 1})
    if path == "enable-state-cache":
        assert (reply.status_code, reply.json()) == (200, "success")
    else:
        assert reply.status_code == 403
        assert reply.json()["error"]["message"].startswith("this would change the server for everybody")
    assert http.get("/health").json()["status"] == "ok"
