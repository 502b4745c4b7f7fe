"""What was acknowledged is there after a sudden end, for its owner alone."""

from __future__ import annotations

import json
import random
import secrets
import signal
import threading
import time
from contextlib import suppress

import httpx
import openai
import pytest
from redis_server import RedisServer
from server_process import Process

ASK, NEXT = "Tell me a story about a dog.", "What happened then?"
GREEDY = {"model": "bundled", "temperature": 0, "max_output_tokens": 24}
GO_ON = {"prompt": ". One day,", "state": "mine", "temperature": 0, "max_tokens": 12}


@pytest.mark.slow  # two servers, and a long conversation
def test_owners_and_a_sudden_end(tmp_path, tmp_key_file):
    """Killed in the middle of other work, the server goes on to the bit."""
    options = ["--api-keys", str(tmp_key_file), "--store", str(tmp_path / "states"), "--cache-ram", "0"]
    server = Process(*options)
    with server.openai(api_key="key-of-ann") as ann, caller(server, "ann") as http:
        first = ann.responses.create(**GREEDY, input=ASK)
        before = ann.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id)
        about = http.post("/v1/states", json={"text": "Once upon a time there was a dog", "name": "mine"}).json()
        text = http.post("/v1/completions", json=GO_ON).json()["choices"][0]["text"]
        endless = {"model": "bundled", "prompt": "A", "max_tokens": 10**6, "stream": True}
        with ann.completions.create(**endless, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
            server.stop(signal.SIGKILL)
    server = Process(*options)
    try:
        with server.openai(api_key="key-of-ann") as ann, caller(server, "ann") as http:
            assert ann.responses.retrieve(before.id) == before
            after = ann.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id)
            assert (after.output_text, after.usage) == (before.output_text, before.usage)
            assert http.get("/v1/states").json()["data"] == [about]
            assert http.post("/v1/completions", json=GO_ON).json()["choices"][0]["text"] == text
        with server.openai(api_key="key-of-bob") as bob, caller(server, "bob") as http:
            check_stranger(bob, http, first.id)
        with server.openai(api_key="key-of-ann") as ann, caller(server, "ann") as http:
            assert http.get("/v1/states/mine").json()["sha256"] == about["sha256"]
            # the items outlive the state
            for file in (tmp_path / "states" / "kept").glob("*.safetensors"):
                file.unlink()
            again = ann.responses.create(**GREEDY, input=NEXT, previous_response_id=before.id)
            assert again.usage.input_tokens_details.cached_tokens == 0
            assert len(ann.responses.input_items.list(again.id).data) == 5
            assert http.get("/v1/states/mine").status_code == 404
    finally:
        server.stop()


@pytest.mark.slow
def test_two_servers_share_a_redis(tmp_path):
    """One goes on with what the other has kept, to the bit."""
    redis = RedisServer(tmp_path)
    servers = [Process("--store", redis.url) for _ in range(2)]
    try:
        with servers[0].openai() as one, servers[1].openai() as two:
            first = one.responses.create(**GREEDY, input=ASK)
            options = GREEDY | {"input": NEXT, "previous_response_id": first.id}
            second, same = two.responses.create(**options), one.responses.create(**options)
            assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
            assert (second.output_text, second.usage) == (same.output_text, same.usage)
            two.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                one.responses.retrieve(first.id)
    finally:
        for server in servers:
            server.stop()
        redis.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_killed_at_random_moments_under_load(tmp_path, kind):
    redis = RedisServer(tmp_path) if kind == "redis" else None
    try:
        kill_and_look(str(tmp_path) if redis is None else redis.url)
    finally:
        if redis is not None:
            redis.stop()


def kill_and_look(store: str) -> None:
    draw = random.Random(3)
    said: dict[str, str] = {}  # what was acknowledged, by its path
    for _ in range(4):
        server = Process("--store", store)
        check_all(server, said)
        clients = [threading.Thread(target=keep_asking, args=(server.url, i, said)) for i in range(6)]
        for client in clients:
            client.start()
        time.sleep(draw.uniform(0.5, 2.5))
        server.stop(signal.SIGKILL)
        for client in clients:
            client.join()
    server = Process("--store", store)
    try:
        check_all(server, said)
    finally:
        server.stop()
    assert len(said) > 100


def keep_asking(url: str, number: int, said: dict[str, str]) -> None:
    """Until the server is gone: states, responses, or a conversation."""
    previous = conversation = leaf = None
    with httpx.Client(base_url=f"{url}/v1", timeout=30) as http, suppress(httpx.HTTPError):
        while True:
            if number % 3 == 2:
                settings = {"max_tokens": 8, "seed": number}
                if conversation is None:
                    made = http.post("/conversations", json={"title": f"{number}", "settings": settings})
                    conversation = made.raise_for_status().json()["id"]
                    said[f"/conversations/{conversation}"] = f"{number}"
                body = {"parent": leaf, "content": f"And {secrets.token_hex(4)}?"}
                with http.stream("POST", f"/conversations/{conversation}/answers", json=body) as reply:
                    for line in reply.iter_lines():
                        event = json.loads(line.removeprefix("data: ") or "{}")
                        if event.get("type") in ("user", "end"):
                            leaf = event["message"]["id"]
                            said[f"/conversations/{conversation}#{leaf}"] = event["message"]["content"]
            elif number % 3 == 1:
                name = secrets.token_hex(4)
                http.post("/states", json={"text": name, "name": name}).raise_for_status()
                said[f"/states/{name}"] = name
            else:
                body = {"input": "And then?", "max_output_tokens": 8, "previous_response_id": previous}
                reply = http.post("/responses", json=body).raise_for_status().json()
                previous = reply["id"]
                said[f"/responses/{previous}"] = reply["output"][0]["content"][0]["text"]


def check_all(server: Process, said: dict[str, str]) -> None:
    with httpx.Client(base_url=f"{server.url}/v1", timeout=30) as http:
        for path, text in said.items():
            place, _, message = path.partition("#")
            found = http.get(place).raise_for_status().json()
            if message:
                [content] = [each["content"] for each in found["messages"] if each["id"] == message]
                assert content == text
            elif path.startswith("/conversations"):
                assert found["title"] == text
            elif path.startswith("/states"):
                assert found["text"] == text
            else:
                assert found["output"][0]["content"][0]["text"] == text


def caller(server: Process, owner: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=30, headers={"x-api-key": f"key-of-{owner}"})


def check_stranger(bob: openai.OpenAI, http: httpx.Client, response: str) -> None:
    """Another owner finds nothing, and may use the same names."""
    for ask in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel, bob.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask(response)
    with pytest.raises(openai.NotFoundError):
        bob.responses.create(**GREEDY, input=NEXT, previous_response_id=response)
    assert http.get("/v1/states").json()["data"] == []
    for reply in (
        http.get("/v1/states/mine"),
        http.get("/v1/states/mine/content"),
        http.delete("/v1/states/mine"),
        http.post("/v1/states/mine/fork", json={"name": "stolen"}),
        http.post("/v1/states", json={"text": "a", "state": "mine"}),
        http.post("/v1/completions", json={"prompt": "a", "state": "mine"}),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "state_not_found")
    assert http.post("/v1/states", json={"text": "Bob's", "name": "mine"}).status_code == 201
