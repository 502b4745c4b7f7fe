"""A real server process, and clients of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from server_process import Process

import heronry
from heronry.serve.app import create_app
from heronry.serve.load import load_models


@pytest.fixture(scope="session")
def server() -> Iterator[Process]:
    """One for all tests that only ask."""
    found = Process()
    yield found
    assert found.stop() == 128 + signal.SIGTERM


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts servers of a test's own, with options; what still runs at its end is killed."""
    started: list[Process] = []

    def begin(*options: str) -> Process:
        started.append(Process(*options))
        return started[-1]

    yield begin
    for process in started:
        process.process.kill()


@pytest.fixture
def client(server) -> openai.OpenAI:
    with server.openai() as client:
        yield client


@pytest.fixture
def http(server) -> httpx.Client:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def llm() -> heronry.LLM:
    return heronry.LLM()


@pytest.fixture(scope="session")
def world(random_checkpoint, tmp_path_factory) -> Iterator[TestClient]:
    """The app in this process, with a random model of World's vocabulary, "tiny", and keys of two owners."""
    file = tmp_path_factory.mktemp("world") / "tiny.pth"
    torch.save(random_checkpoint("7", vocab=65536, width=32, heads=1, layers=1, ffn=64), file)
    (file.parent / "adapters").mkdir()
    keys = {"key-of-ann": "ann", "key-of-bob": "bob"}
    app = create_app(load_models([str(file)]), keys=keys, hosts=["testserver"], adapter_folder=file.parent / "adapters")
    with TestClient(app, headers={"authorization": "Bearer key-of-ann"}) as client:
        yield client


@pytest.fixture(scope="session")
def world_llm(world) -> heronry.LLM:
    return world.app.state.server.models.find("tiny").llm


@pytest.fixture
def tmp_key_file(tmp_path) -> Path:
    file = tmp_path / "keys"
    file.write_text("ann=key-of-ann\nbob=key-of-bob\n", encoding="utf-8")
    return file
