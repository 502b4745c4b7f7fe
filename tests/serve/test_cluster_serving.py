"""`heronry serve --replicas` on a real Ray, and plain servers behind a real HAProxy, with a real Redis."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from load_clients import load
from redis_server import RedisServer
from server_process import Process

from heronry.errors import InputError

pytestmark = pytest.mark.slow
DEPLOY = Path(__file__).parents[2] / "deploy"
WITHOUT_RAY = "make test-cluster installs Ray"
GREEDY = {"model": "bundled", "temperature": 0, "max_output_tokens": 24}
ENDLESS = {"model": "bundled", "max_tokens": 10**6, "extra_body": {"ignore_eos": True}}
ASK = "Tell me a story about a dog that lost its bone in the garden behind the house of an old woman. " * 8
NEXT = "What happened then?"
ROWS, WAITING = 8, 24  # of a replica


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def cluster(redis) -> Iterator[Process]:
    """Two replicas."""
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    options = ["--store", redis.url, "--cache-ram", "0.05", "--threads", "1"]
    limits = ["--max-rows", str(ROWS), "--max-waiting", str(WAITING), "--drain", "5", "--log-level", "warning"]
    found = Process("--replicas", "2", *options, *limits)
    yield found
    processes = psutil.Process(found.process.pid).children(recursive=True)
    assert any("ServeReplica" in process.name() for process in processes)
    assert found.stop() == 128 + signal.SIGTERM, found.lines
    assert not psutil.wait_procs(processes, 10)[1]  # nothing of Ray is left


def process_of(replica: str) -> psutil.Process:
    """That of a replica: the one that writes its log."""
    found = [p for p in psutil.process_iter(["cmdline"]) if "ServeReplica:" in " ".join(p.info["cmdline"] or ())]
    return next(p for p in found if any(replica in file.path for file in p.open_files()))


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def health(url: str) -> dict[str, Any]:
    reply = httpx.get(f"{url}/health", timeout=30)
    return reply.json() if reply.status_code == 200 else {}


def at_work(url: str) -> dict[str, int]:
    """Sequences that are written, requests that wait."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    counts = {}
    for what in ("sequences_decoding", "requests_waiting", "requests_reading"):
        found = re.findall(rf"^heronry:{what}{{.*}} (\S+)", text, re.MULTILINE)
        counts[what] = sum(int(float(count)) for count in found)
    return counts


def replica_of(client: openai.OpenAI, session: str | None = None, **body: Any) -> str:
    """Which one answers."""
    headers = {} if session is None else {"x-session-id": session}
    body = {"model": "bundled", "prompt": "Once", "max_tokens": 1} | body
    return client.completions.with_raw_response.create(**body, extra_headers=headers).headers["x-replica"]


def test_streams_come_piece_by_piece_and_end_with_their_client(cluster):
    with cluster.openai() as client:
        with client.completions.create(prompt="Once", stream=True, **ENDLESS) as events:
            texts = [event.choices[0].text for event, _ in zip(events, range(50), strict=False)]
            assert at_work(cluster.url)["sequences_decoding"] == 1  # it has not been written to its end
        assert "".join(texts)
        wait_until(lambda: at_work(cluster.url)["sequences_decoding"] == 0)


def test_sessions_stick_and_both_replicas_work(cluster):
    with cluster.openai() as client:
        assert len({replica_of(client, f"session {i}") for i in range(30)}) == 2
        for session in ("a", "b", "c"):
            assert len({replica_of(client, session) for _ in range(5)}) == 1
        turns = [{"role": "user", "content": ASK}]
        found = set()
        for _ in range(3):
            raw = client.chat.completions.with_raw_response.create(model="bundled", messages=turns, max_tokens=5)
            found.add(raw.headers["x-replica"])
            turns += [{"role": "assistant", "content": "x"}, {"role": "user", "content": NEXT}]
        assert len(found) == 1
    text = httpx.get(f"{cluster.url}/metrics").text
    counts = re.findall(r'heronry:requests_finished_total{replica="(\w+)"} (\d+)', text)
    assert len(counts) == 2
    assert all(int(count) > 0 for _, count in counts)


def test_a_prompt_that_everybody_sends_is_not_left_to_one_replica(cluster):
    with cluster.openai() as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: replica_of(client, max_tokens=60, prompt="The same"), range(24)))
    assert len(set(found)) == 2


def test_a_killed_replica_loses_no_conversation(cluster, client):
    """client: of a server that nobody kills."""
    chat = [{"role": "user", "content": ASK}]
    greedy = {"model": "bundled", "temperature": 0, "max_tokens": 24}
    first = client.responses.create(**GREEDY, input=ASK)
    expected = client.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id)
    said = client.chat.completions.create(**greedy, messages=chat).choices[0].message.content
    more = [*chat, {"role": "assistant", "content": said}, {"role": "user", "content": NEXT}]
    expected_chat = client.chat.completions.create(**greedy, messages=more).choices[0].message.content

    session = {"x-session-id": "mine"}
    with cluster.openai(default_headers=session) as mine:
        raw = mine.responses.with_raw_response.create(**GREEDY, input=ASK)
        name, begun = raw.headers["x-replica"], raw.parse()
        assert begun.output_text == first.output_text
        again = mine.chat.completions.with_raw_response.create(**greedy, messages=chat)
        assert (again.headers["x-replica"], again.parse().choices[0].message.content) == (name, said)
        with mine.completions.create(prompt="Once", stream=True, **ENDLESS) as events, ThreadPoolExecutor(4) as pool:
            next(iter(events))
            long = {"model": "bundled", "prompt": "Once", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
            asked = [pool.submit(mine.completions.create, **long) for _ in range(4)]  # nothing of them is sent yet
            wait_until(lambda: at_work(cluster.url)["sequences_decoding"] == 5)
            process_of(name).kill()
            with pytest.raises(openai.APIError, match=r"^the replica that answered this has ended; try again$"):
                for _ in events:
                    pass
            assert all(x.result().usage.completion_tokens == 2000 for x in asked)  # another has answered them
        raw = mine.responses.with_raw_response.create(**GREEDY, input=NEXT, previous_response_id=begun.id)
        found = raw.parse()
        assert raw.headers["x-replica"] != name
        assert (found.output_text, found.usage) == (expected.output_text, expected.usage)
        assert found.usage.input_tokens_details.cached_tokens == begun.usage.total_tokens
        found = mine.chat.completions.create(**greedy, messages=more)
        assert found.choices[0].message.content == expected_chat
        assert found.usage.prompt_tokens_details.cached_tokens >= 64
    wait_until(lambda: health(cluster.url).get("replicas") == 2)


def test_of_200_clients_each_is_served_or_told_to_come_again(cluster):
    host, port = cluster.url.removeprefix("http://").split(":")
    _, heard = asyncio.run(asyncio.wait_for(load(host, int(port), 200, 8), 120))
    served = [x for x in heard if x.status == 200]
    assert all(x.complete for x in served)
    assert {x.status for x in heard} <= {200, 429, 503}
    assert len(served) >= ROWS + WAITING

    async def refuse() -> httpx.Response:
        """The first reply to one request too many."""
        endless = {"prompt": "Once", "max_tokens": 10**6, "ignore_eos": True}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60, limits=limits) as http:
            many = [asyncio.ensure_future(http.post("/v1/completions", json=endless)) for _ in range(100)]
            done, waiting = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            return done.pop().result()

    reply = asyncio.run(asyncio.wait_for(refuse(), 120))
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    wait_until(lambda: sum(at_work(cluster.url).values()) == 0)


def test_errors_have_the_shape_of_the_route(cluster):
    with cluster.openai() as client, pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="a")
    assert caught.value.body["message"] == "there is no model 'gpt-9' here; there is bundled"
    with httpx.Client(base_url=cluster.url) as http:
        assert http.post("/v1/completions", content=b"{").json()["error"]["type"] == "invalid_request_error"
        assert http.get("/nothing").json()["error"]["message"] == "there is no such route"
        assert http.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["bundled"]


@pytest.mark.parametrize(
    ("options", "replicas", "cluster", "message"),
    [
        ({}, "0", "local", "--replicas must be a number or FEWEST-MOST, such as 2 or 1-4, got '0'"),
        ({}, "3-2", "local", "--replicas must be a number or FEWEST-MOST, such as 2 or 1-4, got '3-2'"),
        ({"model": ["nowhere.pth"]}, "2", "local", "nowhere.pth: no such file or folder"),
        ({"model": ["bundled", "bundled"]}, "2", "local", "two models are called 'bundled'; name them NAME=PATH"),
        (
            {},
            "2",
            "ray://a:1",
            "--cluster ray:// cannot stream: run this on a machine of the cluster, with --cluster auto",
        ),
        ({}, "2", "auto", "replicas on several machines need a store that they share: --store redis://HOST:PORT/0"),
        ({"store": "redis://x"}, "2", "127.0.0.1:1", "--cluster 127.0.0.1:1: nothing answers there (.*)"),
    ],
)
def test_what_is_wrong_is_said_before_ray_starts(options, replicas, cluster, message):
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    from heronry.serve.cluster.deploy import open_replicas
    from heronry.serve.options import ServeOptions

    match = f"^{re.escape(message).replace(re.escape('(.*)'), '.*')}$"
    with pytest.raises(InputError, match=match), open_replicas(ServeOptions(**options), replicas, cluster, []):
        pass


def test_what_a_replica_finds_wrong_is_one_line(tmp_path):
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    (tmp_path / "bad.pth").write_bytes(b"not a model")
    command = [sys.executable, "-m", "heronry", "serve", "--port", "0", "--replicas", "1", "-m", tmp_path / "bad.pth"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    message = f"heronry: {tmp_path / 'bad.pth'}: not a .pth, .safetensors, GGUF or rwkv.cpp file\n"
    assert (done.returncode, done.stderr) == (2, message)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_config_file_scales_up_and_down_and_its_models_have_replicas_of_their_own(redis, tmp_path):
    pytest.importorskip("ray", reason=WITHOUT_RAY)
    import yaml

    config = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text(encoding="utf-8"))
    port = config["http_options"]["port"] = free_port()
    [app] = config["applications"]
    app["args"] |= {"store": redis.url, "cache_ram": 0.05, "max_rows": 8, "model": ["bundled", "other=bundled"]}
    one = app["deployments"][0]
    quick = {"upscale_delay_s": 0.5, "downscale_delay_s": 2, "look_back_period_s": 2, "metrics_interval_s": 0.5}
    one["autoscaling_config"] |= quick | {"max_replicas": 2, "target_ongoing_requests": 2}
    one["ray_actor_options"] = {"num_cpus": 0.1}
    app["deployments"].append({"name": "other", "ray_actor_options": {"num_cpus": 0.1}})
    file, url = tmp_path / "serve.yaml", f"http://127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [Path(sys.executable).parent / "serve", "run", file]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    try:

        def count() -> int:
            try:
                return health(url).get("replicas", 0)
            except httpx.HTTPError:
                return 0

        wait_until(lambda: count() == 2 or process.poll() is not None, 120)  # one of each model
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["bundled", "other"]
            assert replica_of(client, "x") != replica_of(client, "x", model="other")
            with pytest.raises(openai.NotFoundError, match="there is no model 'third' here; there is bundled, other"):
                client.completions.create(model="third", prompt="a")
            made = httpx.post(f"{url}/v1/conversations", json={"settings": {"model": "other", "max_tokens": 2}}).json()
            answered = httpx.post(f"{url}/v1/conversations/{made['id']}/answers", json={"content": "Hello"})
            assert replica_of(client, "x", model="other") == answered.headers["x-replica"]
            assert '"model":"other"' in answered.text.replace(" ", "")
            streams = [client.completions.create(prompt=f"{i}", stream=True, **ENDLESS) for i in range(6)]
            for events in streams:
                assert next(iter(events)).choices[0].finish_reason is None
            wait_until(lambda: count() == 3)
            for events in streams:
                events.close()
            wait_until(lambda: count() == 2)
            assert replica_of(client)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_servers_behind_a_proxy(redis, tmp_path):
    """One that is killed: the session goes on at the other."""
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("haproxy is not installed (Debian: apt-get install haproxy)")
    servers = [Process("--store", redis.url, "--cache-ram", "0", "--threads", "1") for _ in range(2)]
    text, port = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8"), free_port()
    for old, new in (("127.0.0.1:8080", f"127.0.0.1:{port}"), ("log stdout", "# log stdout")):
        text = text.replace(old, new)
    for number, server in enumerate(servers, 8001):
        text = text.replace(f"127.0.0.1:{number}", server.url.removeprefix("http://"))
    (tmp_path / "haproxy.cfg").write_text(text, encoding="utf-8")
    proxy = subprocess.Popen([program, "-db", "-f", tmp_path / "haproxy.cfg"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def finished(server: Process) -> int:
        text = httpx.get(f"{server.url}/metrics").text
        return int(float(re.search(r"^heronry:requests_finished_total (\S+)", text, re.MULTILINE)[1]))

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_up)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for session in ("a", "b"):
                headers, before = {"x-session-id": session}, [finished(server) for server in servers]
                for _ in range(4):
                    client.completions.create(model="bundled", prompt="Once", max_tokens=1, extra_headers=headers)
                counts = [finished(server) - count for server, count in zip(servers, before, strict=True)]
                assert sorted(counts) == [0, 4]
            first = client.responses.create(**GREEDY, input=ASK, extra_headers=headers)
            expected = client.responses.create(
                **GREEDY, input=NEXT, previous_response_id=first.id, extra_headers=headers
            )
            with client.completions.create(prompt="Once", stream=True, extra_headers=headers, **ENDLESS) as events:
                assert [event for event, _ in zip(events, range(3), strict=False)]
            servers[counts.index(4)].stop(signal.SIGKILL)
            found = client.responses.create(**GREEDY, input=NEXT, previous_response_id=first.id, extra_headers=headers)
            assert (found.output_text, found.usage) == (expected.output_text, expected.usage)
            servers[counts.index(0)].stop(signal.SIGKILL)
            with pytest.raises(openai.InternalServerError) as caught:
                wait_until(lambda: client.models.list() is None, 20)
            assert caught.value.body["message"] == "no server is ready; try again"
    finally:
        proxy.terminate()
        for server in servers:
            server.process.kill()
