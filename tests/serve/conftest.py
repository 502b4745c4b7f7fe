"""A real server process, and clients of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from server_process import Process

import heronry


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
def llm():
    return heronry.LLM()


@pytest.fixture
def tmp_key_file(tmp_path) -> Path:
    file = tmp_path / "keys"
    file.write_text("ann=key-of-ann\nbob=key-of-bob\n", encoding="utf-8")
    return file
