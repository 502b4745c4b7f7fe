"""Who may come in, and how everybody is told what is wrong."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time

import httpx
import openai
import pytest
from typer.testing import CliRunner

from heronry.cli.app import app

BODY = {"model": "bundled", "prompt": "Once upon a time", "max_tokens": 4}


def error_of(reply: httpx.Response) -> dict:
    assert reply.json().keys() == {"error"}
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
    return reply.json()["error"]


def test_errors_have_openais_shape(http, client):
    reply = http.post("/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "the body is not JSON" in error_of(reply)["message"]
    reply = http.post("/v1/completions", content=b"prompt=a")
    assert (reply.status_code, error_of(reply)["message"]) == (
        400,
        "the body must be a JSON object, sent as application/json",
    )
    reply = http.get("/v1/completions")
    assert (reply.status_code, error_of(reply)["type"]) == (405, "invalid_request_error")
    reply = http.get("/v2/nothing")
    assert (reply.status_code, error_of(reply)["type"]) == (404, "not_found_error")
    reply = http.post("/v1/completions", json=BODY | {"prompt": 5})
    assert (reply.status_code, error_of(reply)["param"].split(".")[0]) == (400, "prompt")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here; there is bundled") as error:
        client.completions.create(**BODY | {"model": "gpt-9"})
    assert error.value.code == "model_not_found"
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).json()["model"] == "bundled"


def test_headers(http):
    reply = http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    assert int(reply.headers["openai-processing-ms"]) >= 0
    assert http.get("/v1/models", headers={"x-request-id": "no\tgood"}).headers["x-request-id"].startswith("req_")
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": "http://a.b"}).headers


def test_names_of_other_hosts_are_refused(http):
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200


def test_models_tokens_and_health(http, client, llm):
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == ("bundled", "heronry")
    assert model.meta["n_params"] == llm.num_parameters()
    assert client.models.retrieve("bundled") == model
    assert http.get("/v1/models/none").status_code == 404
    assert http.get("/health").json()["status"] == "ok"
    ids = llm.tokenizer.encode("Hi ä")
    assert http.post("/tokenize", json={"prompt": "Hi ä"}).json()["tokens"] == ids
    assert http.post("/tokenize", json={"content": "Hi ä"}).json() == {"tokens": ids}
    pieces = http.post("/tokenize", json={"content": "Hi ä", "with_pieces": True}).json()["tokens"]
    assert [x["id"] for x in pieces] == ids
    assert [x["piece"] for x in pieces[-2:]] == [[0xC3], [0xA4]]
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Hi ä", "content": "Hi ä"}
    assert http.post("/tokenize", json={}).status_code == 400
    asked = [{"role": "user", "content": "Hi"}]
    counted = http.post("/tokenize", json={"messages": asked}).json()
    used = http.post("/v1/chat/completions", json={"messages": asked, "max_tokens": 1}).json()["usage"]
    assert counted["count"] == len(counted["tokens"]) == used["prompt_tokens"]
    assert http.get("/load").json() == {"server_load": 0}
    about = http.get("/tokenizer_info").json()
    assert (
        http.post("/tokenize", json={"prompt": about["eos_token"]}).json()["tokens"]
        == sorted(llm.tokenizer.stop_ids)[:1]
    )


def test_metrics(http):
    def read() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {name: float(x) for name, x in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    before = read()
    body = BODY | {"prompt": [i % 50 + 300 for i in range(150)], "max_tokens": 5, "ignore_eos": True}
    for _ in range(3):
        assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 5
    labels = '{model_name="bundled"}'
    while (after := read())[f"vllm:num_requests_running{labels}"]:
        pass  # the last turn of the scheduler's loop
    more = {name: after[name] - before.get(name, 0) for name in after}
    cached = more["heronry:prompt_tokens_cached_total"]
    assert cached in (128, 256)  # from the second or third on
    assert more["heronry:prompt_tokens_total"] == 450 - cached
    assert more["heronry:generation_tokens_total"] == 15
    assert more["heronry:state_cache_hits_total"] == cached / 128
    assert more["heronry:state_cache_misses_total"] == 3 - cached / 128
    assert after["heronry:state_cache_ram_bytes"] > 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_time_per_output_token"):
        assert more[f"heronry:{name}_seconds_count"] == more[f"vllm:{name}_seconds_count{labels}"] == 3
    assert more[f"vllm:prompt_tokens_total{labels}"] == more[f"vllm:prefix_cache_queries_total{labels}"] == 450
    assert more[f"vllm:prefix_cache_hits_total{labels}"] == cached
    assert more['vllm:request_success_total{finished_reason="length",model_name="bundled"}'] == 3
    assert after[f"vllm:num_requests_waiting{labels}"] == 0
    assert more["llamacpp:tokens_predicted_total"] == 15
    assert more["llamacpp:n_decode_total"] == 15
    assert after["llamacpp:n_tokens_max"] >= 155
    written, seconds = after["llamacpp:tokens_predicted_total"], after["llamacpp:tokens_predicted_seconds_total"]
    assert after["llamacpp:predicted_tokens_seconds"] == pytest.approx(written / seconds)
    took = more["heronry:request_queue_time_seconds_sum"] + more["heronry:request_prefill_time_seconds_sum"]
    took += more["heronry:request_decode_time_seconds_sum"]
    assert took == pytest.approx(more["heronry:e2e_request_latency_seconds_sum"], rel=1e-6)


def test_keys_sizes_and_the_end(start, tmp_key_file):
    server = start("--api-keys", str(tmp_key_file), "--max-body", "2000", "--drain", "20")
    with httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = http.get("/v1/models", headers=headers)
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key")
        assert http.get("/v1/models", headers={"x-api-key": "key-of-bob"}).status_code == 200
        http.headers["authorization"] = "Bearer key-of-ann"
        assert http.get("/v1/models").status_code == 200
        reply = http.post("/v1/completions", json=BODY | {"prompt": "a" * 3000})
        assert (reply.status_code, error_of(reply)["message"]) == (413, "the body is larger than 2,000 bytes")

        def pieces():
            for _ in range(30):
                yield b" " * 100

        reply = http.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        assert reply.status_code == 413
        # what is under way ends before the server does
        seen = []
        with http.stream(
            "POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        ) as reply:
            lines = reply.iter_lines()
            seen.append(next(lines))
            stopped = threading.Thread(target=lambda: seen.insert(0, server.stop(signal.SIGTERM)))
            stopped.start()
            seen += list(lines)
        stopped.join()
    assert seen[0] == 128 + signal.SIGTERM
    assert "data: [DONE]" in seen
    assert json.loads(seen[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert any(json.loads(line)["path"] == "/v1/completions" for line in server.lines if line.startswith("{"))


def test_a_client_that_goes_away_frees_its_row(server, http):
    def decoding() -> int:
        return http.get("/health").json()["decoding"]

    endless = BODY | {"max_tokens": 10**6, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=endless | {"stream": True}) as reply:
        lines = reply.iter_lines()
        for _ in range(4):
            next(lines)
        assert decoding() == 1
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(endless).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(0.3)
    deadline = time.monotonic() + 10
    while decoding() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert decoding() == 0


def test_a_port_in_use(server, capfd):
    port = server.url.rpartition(":")[2]
    found = CliRunner().invoke(app, ["serve", "--port", port])
    assert f"port {port}: Address already in use; choose another with --port" in str(found.exception)


def test_a_client_that_leaves_leaves_one_line(server):
    begin = len(server.lines)
    endless = {"prompt": "Once", "max_tokens": 10**6, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=endless, timeout=0.3, headers={"x-request-id": "gone"})
    for _ in range(100):
        if any('"gone"' in line for line in server.lines[begin:]):
            break
        time.sleep(0.05)
    time.sleep(0.1)
    assert [line for line in server.lines[begin:] if '"gone"' in line]
    assert not [line for line in server.lines[begin:] if "Traceback" in line or "Exception" in line]
