"""eval, see, data and train on the command line: results as JSON, folders, and what is said at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from faulty import refused

import heronry
from heronry import LLM, evaluate
from heronry.checkpoint import save_time_state
from heronry.models.vision.vrwkv import VRWKV, VRWKVConfig

pytestmark = pytest.mark.usefixtures("own_folders")


def test_eval_as_json_and_from_a_tuned_state(command, folder):
    model = heronry.load(folder / "m.pth").tune_state()
    with torch.no_grad():
        for name in model.time_states():
            torch.nn.init.normal_(model.get_parameter(name), std=3.0)
    save_time_state(model, "tuned.safetensors")
    words = ("eval", folder / "t.txt", "-m", folder / "m.pth")
    figures = json.loads(command(*words, "--json")[1])[str(folder / "t.txt")]
    score = evaluate.score_texts(LLM(folder / "m.pth"), ["hello world"])
    assert (figures["tokens"], figures["bytes"], figures["texts"]) == (score.tokens, score.bytes, 1)
    assert figures["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    llm = LLM(folder / "m.pth")
    llm.begin_from("tuned.safetensors")
    tuned = evaluate.score_texts(llm, ["hello world"])
    assert tuned.bits_per_byte != pytest.approx(score.bits_per_byte)
    out = command(*words, "--state", "tuned.safetensors")[1]
    assert f"{tuned.bits_per_byte:.4f} bits per byte" in out
    llm.state("a").save("s")
    llm.chat(template="world").save("talk")
    for name, said in (
        ("s", "is the state after a text, which only `heronry generate` and LLM.generate continue"),
        ("talk", "is a conversation, which `heronry chat --session` or Chat.load continues"),
    ):
        refused(command("chat", "-m", folder / "m.pth", "--state", name), f"{name}: {said}")
    lambada = json.loads(command(*words, "--lambada", "--json")[1])[str(folder / "t.txt")]
    assert lambada.keys() == {"passages", "perplexity", "accuracy"}


def test_see_a_folder(command):
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    model = VRWKV(VRWKVConfig(64, 1, 128, 10, 32, 16))
    model.init_weights()
    heronry.save(model, "model")
    Path("pictures").mkdir()
    for name in ("b.PNG", "a.jpg"):
        image.new("RGB", (40, 40), (200, 10, 10)).save(Path("pictures", name))
    Path("pictures", "notes.txt").write_text("no picture")
    code, out, _ = command("see", "pictures", "-m", "model")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == ["pictures/a.jpg", "pictures/b.PNG"]
    Path("empty").mkdir()
    refused(command("see", "empty", "-m", "model"), "empty: holds no picture")


def test_data_of_a_device(command):
    refused(command("data", "/dev/null", "-o", "x"), "/dev/null: unsupported kind of file; expected .txt")


def test_the_end_of_a_training_and_after_it(command, folder):
    """What to try next; the same command again changes nothing; no bar where there is no terminal."""
    assert command("data", folder / "t.txt", "-o", "t", "--tokenizer", "bytes", "--workers", 1)[0] == 0
    words = (
        "train",
        "data.train=t",
        "model.n_layer=1",
        "model.n_embd=64",
        "run.steps=2",
        "run.batch=1",
        "run.log_every=1",
    )
    code, out, err = command(*words)
    assert (code, out) == (0, "out\n")
    assert re.match(r"rwkv7: [\d,]+ parameters to train, 11 tokens, rows of 1024 tokens, 2 steps of 1\n", err), err
    assert err.splitlines()[-1] == "try it: heronry generate -m out PROMPT"
    assert not re.search(r"━|elapsed", err)
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert command(*words) == (
        0,
        "",
        "out: already finished, after 2 steps; raise run.steps to go on, or choose another run.out\n",
    )
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    Path("out", "model.safetensors").unlink()  # stopped before it was saved
    assert command(*words)[:2] == (0, "out\n")
    assert Path("out", "model.safetensors").is_file()
    assert "try it" in command(*words[:-3], "run.steps=3", *words[-2:])[2]
    code, _, err = command("train", "data.train=t", "model.path=out", "model.tune=state", "run.out=state", *words[-3:])
    assert code == 0
    assert err.splitlines()[-1] == "try it: heronry generate -m out --state state PROMPT"
    assert command("generate", "x", "-m", "out", "--state", "state", "--max-tokens", 1)[0] == 0
    for tune in ("lora", "dora", "miss"):
        err = command("train", "data.train=t", "model.path=out", f"model.tune={tune}", f"run.out={tune}", *words[-3:])[
            2
        ]
        assert err.splitlines()[-1] == f"try it: heronry generate -m out --adapter {tune} PROMPT"
