"""`heronry info`: what a file holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from faulty import refused
from safetensors.torch import save_file

import heronry
from heronry import LLM, catalog
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.checkpoint import save_time_state
from heronry.convert import convert
from heronry.models.vision.vrwkv import VRWKV, VRWKVConfig

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
    assert about["file"] == "a .pth under BlinkDL's names, as RWKV-LM and most trainers write it"
    assert "trained context" not in about
    for name, length in (("x-ctx25600.pth", 25600), ("x-CTX8k.pth", 8192), ("x-20260930-ctx4096.pth", 4096)):
        shutil.copy(folder / "m.pth", tmp_path / name)
        assert info(command, tmp_path / name)["trained context"] == length
    (long / "release-manifest.json").write_text('{"identity": {"training_context_length": 10240}}')
    about = info(command, long)
    assert about["trained context"] == 10240
    assert about["file"] == "a folder of heronry's, as save and convert write it"
    for wrong in ("{", "[]", '{"identity": {"training_context_length": -1}}', '{"identity": 3}'):
        (long / "release-manifest.json").write_text(wrong)
        assert "trained context" not in info(command, long)


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
    assert (about["branches"], about["branch"], about["messages before"]) == ({"main": 1, "other": 2}, "other", 1)

    save_adapter(inject_adapter(heronry.load(folder / "m.pth"), 4, 8), "adapter")
    about = info(command, "adapter")
    assert (about["kind"], about["method"], about["rank"], about["alpha"]) == ("adapter", "LoRA", 4, 8)
    assert about["matrices"] == 12

    assert command("data", folder / "t.txt", "-o", "tokens", "--tokenizer", "bytes", "--workers", 1)[0] == 0
    for name in ("tokens", "tokens.bin", "tokens.idx", "tokens.json"):
        about = info(command, name)
        assert (about["kind"], about["documents"], about["tokens"]) == ("token file", 1, 11)
        assert (about["tokenizer"], about["vocab_size"]) == ("bytes", 256)

    model = heronry.load(folder / "m.pth").tune_state()
    save_time_state(model, "tuned.safetensors", {"chat_template": "world"})
    about = info(command, "tuned.safetensors")
    assert (about["kind"], about["n_layer"], about["shape"]) == ("tuned state", 2, [1, 64, 64])
    assert about["notes"] == {"chat_template": "world"}
    assert about["file"] == "a tuned state of heronry's"
    states = {f"blocks.{i}.att.time_state": torch.randn(1, 64, 64) for i in range(2)}
    torch.save(states, "peft.pth")
    save_file({name: x.half() for name, x in states.items()}, "ai00.state")
    assert info(command, "peft.pth")["file"] == "a tuned state as RWKV-LM, RWKV-PEFT and rwkv_lightning write it"
    assert info(command, "ai00.state")["file"] == (
        "a tuned state of Ai00's or web-rwkv's: float16 and transposed, which is undone"
    )
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(1, 64, 64) for i in range(2)}, "tuned.pth")
    assert info(command, "tuned.pth")["kind"] == "tuned state"


def test_plain_words_and_nothing_that_is_not_there(command, folder, tmp_path):
    shown = command("info", folder / "m.pth")[1]
    for word in ("time_state", "deep_rank", "unknown", "None", "False"):
        assert word not in shown
    torch.save(
        {**torch.load(folder / "m.pth"), **{f"blocks.{i}.att.time_state": torch.zeros(1, 64, 64) for i in range(2)}},
        "tuned.pth",
    )
    assert "tuned initial state  yes" in command("info", "tuned.pth")[1]
    config = VRWKVConfig(64, 1, 128, 10, 32, 16, drop_path=0.1, init_values=1.0, segments=4)
    heronry.save(VRWKV(config), "pictures")
    shown = command("info", "pictures")[1]
    for word in ("init_values", "drop_path", "decay_lr", "post_norm", "None"):
        assert word not in shown
    assert "segments of the authors' kernel  4" in shown
    chat = LLM(folder / "m.pth").chat(template="world")
    chat.say("a", 2)
    chat.save("talk")
    assert "main (1 turn)" in command("info", "talk")[1]


def test_what_is_packed_is_said(command):
    convert("bundled", "a.gguf", dtype="q8_0")
    about = info(command, "a.gguf")
    assert (about["dtype"], about["loaded as"], about["tokenizer"]) == ("q8_0", "float32", "in the file")
    assert info(command, "bundled")["template"] == "story"


@pytest.mark.slow
def test_info_of_a_graph(command, random_checkpoint):
    torch.save(random_checkpoint("7", width=64, heads=1, layers=2, ffn=64, rank=8), "a.pth")
    convert("a.pth", "a.onnx")
    about = info(command, "a.onnx")
    assert (about["kind"], about["generation"], about["vocab_size"]) == ("ONNX graph", "rwkv7", 101)
    assert about["inputs"].startswith("tokens [batch, tokens], att_shift [2, batch, 64], wkv [2, batch, 1, 64, 64]")
    assert about["outputs"].startswith("logits [batch, tokens, 101], ")
    assert about["size"] == Path("a.onnx").stat().st_size
    Path("b.onnx").write_bytes(b"\xff\xff")
    refused(command("info", "b.onnx"), "b.onnx: damaged, or not an ONNX file")


def test_info_of_what_other_commands_write(command, folder):
    """The folder of a tuned state, and the features of `see`."""
    save_file({"features": torch.zeros(3, 8)}, "f.safetensors", metadata={"pictures": "[]", "model": "x"})
    about = info(command, "f.safetensors")
    assert (about["kind"], about["pictures"], about["channels"], about["fingerprint"]) == (
        "features of pictures",
        3,
        8,
        "x",
    )
    Path("run").mkdir()
    save_time_state(heronry.load(folder / "m.pth").tune_state(), "run/time_state.safetensors")
    assert info(command, "run")["kind"] == "tuned state"


def test_the_model_of_the_configuration(command, folder, tmp_path, monkeypatch):
    file = tmp_path / "config" / "heronry" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'model = "{folder / "m.pth"}"')
    assert command("info") == command("info", folder / "m.pth")
    assert command("info", "bundled")[1] != command("info")[1]  # what is named comes first
    monkeypatch.setenv("HERONRY_MODEL", "nothing")
    refused(
        command("info"),
        "nothing: no such file or folder; `heronry list` shows the short names of models "
        "(model comes from HERONRY_MODEL)",
    )
    refused(command("info", "a", "-m", "b"), "give FILE or --model, not both")


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
