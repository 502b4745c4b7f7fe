"""`heronry info`: what a file holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from faulty import refused

import heronry
from heronry import LLM, catalog
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.checkpoint import save_time_state

pytestmark = pytest.mark.usefixtures("own_folders")

STATE = 2 * (2 * 64 + 64 * 64) * 4  # bytes


def info(command, *words) -> dict:
    """Both forms, compared."""
    code, out, _ = command("info", *words)
    assert code == 0
    assert all(line == line.rstrip() for line in out.splitlines())
    shown = dict(line.split("  ", 1) for line in out.splitlines())
    about = json.loads(command("info", *words, "--json")[1])
    assert list(shown) == list(about)
    return about


def test_info_of_a_checkpoint(command, folder, tmp_path):
    about = info(command, folder / "m.pth")
    assert (about["generation"], about["n_layer"], about["vocab_size"], about["tokenizer"]) == (
        "rwkv7",
        2,
        256,
        "bytes",
    )
    assert about["state"] == STATE
    assert about["weights"]["float32"] == 4 * about["parameters"]
    long = tmp_path / ("a" * 200) / ("b" * 200)
    heronry.save(heronry.load("bundled"), long, catalog.BUNDLED / "tokenizer.json")
    assert str(long / "tokenizer.json") in command("info", long)[1]  # not cut


def test_info_names_the_chat_template(command, folder, tmp_path):
    assert info(command, folder / "m.pth")["template"] == "world"
    assert info(command, "bundled")["template"] == "story"
    shutil.copy(folder / "m.pth", tmp_path / "rwkv7-g1a-0.1b.pth")
    assert info(command, tmp_path / "rwkv7-g1a-0.1b.pth")["template"] == "g1"
    heronry.save(heronry.load(folder / "m.pth"), tmp_path / "own")
    file = tmp_path / "own" / "chat_template.jinja"
    file.write_text("{{ messages }}")
    assert info(command, tmp_path / "own")["template"] == f"Jinja ({file})"
    file.write_bytes(b"\xff")
    assert info(command, tmp_path / "own")["template"] == f"{file}: byte 0 is not UTF-8"


def test_info_of_all_else(command, folder):
    llm = LLM(folder / "m.pth")
    llm.state("Hello " * 30).save("state")
    about = info(command, "state")
    assert (about["kind"], about["rows"], about["n_layer"], about["size"]) == ("state", 1, 2, STATE)
    assert about["texts"] == ["Hello " * 30]
    assert about["fingerprint"] == llm.model.fingerprint

    chat = llm.chat(template="world", system="Be kind.")
    chat.say("a", 3)
    chat.fork("other")
    chat.say("b", 3)
    chat.save("talk")
    about = info(command, "talk")
    assert about["kind"] == "conversation"
    assert (about["branches"], about["branch"], about["history"]) == ({"main": 1, "other": 2}, "other", 1)

    save_adapter(inject_adapter(heronry.load(folder / "m.pth"), 4, 8), "adapter")
    about = info(command, "adapter")
    assert (about["kind"], about["method"], about["rank"], about["alpha"]) == ("adapter", "LoRA", 4, 8)
    assert about["matrices"] == 12

    assert command("data", folder / "t.txt", "-o", "tokens", "--tokenizer", "bytes", "--workers", 1)[0] == 0
    for name in ("tokens", "tokens.bin", "tokens.idx"):
        about = info(command, name)
        assert (about["kind"], about["documents"], about["tokens"]) == ("token file", 1, 11)
        assert (about["tokenizer"], about["vocab_size"]) == ("bytes", 256)

    model = heronry.load(folder / "m.pth").tune_state()
    save_time_state(model, "tuned.safetensors", {"chat_template": "world"})
    about = info(command, "tuned.safetensors")
    assert (about["kind"], about["n_layer"], about["shape"]) == ("tuned state", 2, [1, 64, 64])
    assert about["notes"] == {"chat_template": "world"}
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(1, 64, 64) for i in range(2)}, "tuned.pth")
    assert info(command, "tuned.pth")["kind"] == "tuned state"


def test_damaged_files_of_every_kind(command, folder):
    LLM(folder / "m.pth").state("a").save("state")
    whole = Path("state").read_bytes()
    Path("state").write_bytes(whole[: len(whole) // 2])
    refused(command("info", "state"), "state: ")
    Path("talk").write_bytes(b"heronry.chat 2\nrubbish")
    refused(command("info", "talk"), "talk: damaged or truncated conversation file")
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("[]")
    refused(command("info", "adapter"), "adapter: adapter_config.json is not a JSON object")
