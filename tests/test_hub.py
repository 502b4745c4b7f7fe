"""Names of the hub: from its cache without a network, and what is said where there is neither."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import heronry
from heronry import hub
from heronry.convert import convert

SMALL = {"width": 64, "heads": 1, "ffn": 64, "rank": 32, "layers": 2, "vocab": 256}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(random_checkpoint, tmp_path):
    """A cache as huggingface_hub lays it out, with a checkpoint of BlinkDL's and a folder of Hugging Face's."""
    torch.save(random_checkpoint("4", **SMALL), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "hf", to="huggingface")
    for name, files in (
        ("BlinkDL--rwkv-4-pile-169m", [tmp_path / "a.pth"]),
        ("RWKV--rwkv-4-169m-pile", list((tmp_path / "hf").iterdir())),
    ):
        repository = tmp_path / "cache" / f"models--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        for file in files:
            shutil.copy(file, repository / "snapshots" / COMMIT / file.name)
    return tmp_path / "cache"


def run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    found = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=found)


@pytest.mark.parametrize(
    "name",
    [
        "hf://BlinkDL/rwkv-4-pile-169m/a.pth",
        "hf://BlinkDL/rwkv-4-pile-169m@main/a.pth",
        "RWKV/rwkv-4-169m-pile",
        "hf://RWKV/rwkv-4-169m-pile",
    ],
)
def test_from_the_cache_without_a_network(name, cache):
    done = run(f"import heronry; print(heronry.load({name!r}).fingerprint)", cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == heronry.load(cache.parent / "a.pth").fingerprint


def test_auto_classes_by_name(cache):
    code = (
        "from heronry.integrations.transformers import register; register()\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "name = 'RWKV/rwkv-4-169m-pile'\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)\n"
        "print(model.generate(**tokenizer('ab', return_tensors='pt'), max_new_tokens=3, eos_token_id=None).shape)"
    )
    done = run(code, cache)
    assert done.stdout.strip() == "torch.Size([1, 5])", done.stderr


def test_on_the_command_line(cache):
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "heronry", "info", "hf://BlinkDL/rwkv-4-pile-169m/a.pth"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "rwkv4" in done.stdout, done.stderr
    out = cache.parent / "out"
    command = [sys.executable, "-m", "heronry.convert.huggingface", "--repo_id", "BlinkDL/rwkv-4-pile-169m"]
    command += ["--checkpoint_file", "a.pth", "--output_dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "logits of both differ by at most 0" in done.stdout, done.stderr
    assert heronry.load(out).name == "rwkv4"
    done = subprocess.run([*command, "--push_to_hub"], capture_output=True, text=True, env=environment)
    assert "--model_name" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://BlinkDL/rwkv-4-pile-169m/b.pth", "not in the hub's cache, and the hub cannot be reached"),
        ("Nobody/nothing", "not in the hub's cache, and the hub cannot be reached"),
        ("hf://BlinkDL", "give hf://OWNER/REPOSITORY"),
    ],
)
def test_without_a_network_in_one_line(name, message, cache):
    code = f"import heronry\ntry: heronry.load({name!r})\nexcept heronry.InputError as error: print(error)"
    done = run(code, cache)
    assert message in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
def test_a_hub_that_does_not_answer(cache):
    began = time.monotonic()
    code = "import heronry\ntry: heronry.load('hf://a/b/c.pth')\nexcept heronry.InputError as error: print(error)"
    done = run(code, cache, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert time.monotonic() - began < 60


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("RWKV/rwkv-4-169m-pile")
    assert hub.is_name("hf://a/b/c.pth")
    assert hub.is_name(Path("hf://a/b/c.pth"))
    for path in ("model.pth", "/abs/model", "./a/b", "a/b/c", "~/a", "a/b c"):
        assert not hub.is_name(path)
    (tmp_path / "runs").mkdir()
    assert not hub.is_name("runs/typo")
