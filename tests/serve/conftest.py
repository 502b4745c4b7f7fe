"""A real server process, and clients of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient

import heronry
from heronry.serve.app import create_app
from heronry.serve.load import load_models


class Process:
    """`heronry serve` on a free port, with its address and what it has said."""

    def __init__(self, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "heronry", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}))
        self.lines: list[str] = []
        self.url = ""
        ready = threading.Event()

        def read() -> None:
            for line in self.process.stderr:
                self.lines.append(line)
                if found := re.search(r" at (http://\S+)/v1 ", line):
                    self.url = found[1]
                    ready.set()
            ready.set()

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        assert ready.wait(60)
        assert self.url, self.lines

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.reader.join(5)
        return code

    def openai(self, **options) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})


@pytest.fixture(scope="session")
def server() -> Iterator[Process]:
    """One for all tests that only ask."""
    found = Process()
    yield found
    assert found.stop() == 128 + signal.SIGTERM


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
    app = create_app(load_models([str(file)]), keys={"key-of-ann": "ann", "key-of-bob": "bob"}, hosts=["testserver"])
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
