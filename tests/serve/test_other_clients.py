"""Programs that know OpenAI's API and not this server: `llm` on the command line, LangChain, and schemathesis, which
reads the server's own document of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BIN = Path(__file__).parents[2] / "build" / "clients" / "bin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "llm").exists(), reason="make build/clients has not been run"),
]


def run(*command: object, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llm_on_the_command_line(server, llm, tmp_path):
    model = f"- model_id: here\n  model_name: bundled\n  api_base: {server.url}/v1\n  supports_schema: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)

    def ask(*words: object) -> str:
        return run(BIN / "llm", *words, "-o", "max_tokens", 20, "-o", "temperature", 0, LLM_USER_PATH=str(tmp_path))

    messages = [{"role": "user", "content": "Who?"}]
    said = llm.chat(messages, 20, temperature=0, presence_penalty=0, frequency_penalty=0).text
    assert ask("-m", "here", "Who?") == ask("-m", "here", "Who?", "--no-stream") == said + "\n"
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    said = llm.chat(messages, 20, temperature=0, presence_penalty=0, frequency_penalty=0).text
    assert ask("-c", "And then?") == said + "\n"
    [logged] = json.loads(run(BIN / "llm", "logs", "--json", "-n", "1", LLM_USER_PATH=str(tmp_path)))
    assert logged["output_tokens"] == 20
    assert ask("-m", "here", "Who?", "--schema", json.dumps({"enum": ["yes"]})) == '"yes"\n'


def test_langchain(server, llm):
    found = json.loads(run(BIN / "python", Path(__file__).with_name("langchain_client.py"), f"{server.url}/v1"))
    messages = [{"role": "user", "content": "Who?"}]
    said = llm.chat(messages, 20, temperature=0, presence_penalty=0, frequency_penalty=0)
    assert found["text"] == found["stream"] == found["response"] == found["batch"][0] == said.text
    assert found["usage"] == [said.usage.prompt_tokens, 20]
    assert found["reason"] == "length"
    assert set(found["person"]) == {"name", "age"}
    assert found["cached"] == said.usage.prompt_tokens + 20
    assert np.allclose(found["embedding"], llm.embed(["a dog"])[0], atol=1e-6)


def test_no_request_is_an_error_of_the_server(tmp_path):
    """A short form of `make soak`."""
    program = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, program, "--phases", "fuzzing", "--max-examples", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
