"""Models by short names, and defaults of a file and of the environment."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from faulty import refused

import heronry
from heronry import LLM, catalog, hub

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def configure(tmp_path):
    def write(text: str | bytes) -> None:
        file = tmp_path / "config" / "heronry" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)

    return write


# Models by name


def test_bundled_is_a_name(command):
    here = command("generate", "Once", "--max-tokens", 5, "--seed", 1)
    assert here[0] == 0
    named = command("generate", "Once", "--max-tokens", 5, "--seed", 1, "-m", "bundled", "--tokenizer", "bundled")
    assert named == here
    assert command("info", "bundled") == command("info")
    assert heronry.load("bundled").fingerprint == heronry.load(catalog.BUNDLED).fingerprint
    assert LLM("bundled").dtype == torch.float32
    Path("t.txt").write_text("Once upon a time")
    assert command("data", "t.txt", "-o", "t", "--tokenizer", "bundled", "--workers", 1)[0] == 0
    assert Path("t.tokenizer.json").read_bytes() == (catalog.BUNDLED / "tokenizer.json").read_bytes()


def test_pull_list_and_rm(command, folder, monkeypatch):
    asked = []

    def fetch(name, local_dir):
        asked.append((name, local_dir))
        path = local_dir / name.split("/")[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "m.pth").read_bytes())
        return path

    monkeypatch.setattr(hub, "fetch", fetch)
    models, model = catalog.models_folder(), catalog.published()["g1-0.1b"]
    refused(command("generate", "x", "-m", "g1-0.1b"), "g1-0.1b: not downloaded yet; `heronry pull g1-0.1b` does it")
    assert command("pull", "g1-0.1b") == (0, f"{models / model.file}\n", "")
    assert command("pull", "g1-0.1b") == (0, "", f"g1-0.1b: is there already, {models / model.file}\n")
    assert asked == [(f"hf://BlinkDL/rwkv7-g1/{model.file}", models)]
    assert command("generate", "x", "-m", "g1-0.1b", "--tokenizer", "bytes", "--max-tokens", 3)[0] == 0
    assert command("pull", "hf://somebody/some@main/x.pth")[0] == 0
    assert asked[-1] == ("hf://somebody/some@main/x.pth", models)
    assert command("pull", "somebody/folder")[0] == 0
    assert asked[-1] == ("somebody/folder", models / "folder")
    refused(command("pull", "g1-1.b"), "unknown model 'g1-1.b'; did you mean 'g1-1.5b'?")

    lines = command("list")[1].splitlines()
    assert lines[0].split() == ["name", "generation", "parameters", "size", "memory", "context", "license", "here"]
    assert lines[1].split() == ["bundled", "rwkv7", "3.8", "M", "7.6", "MB", "0.4", "GB", "1,024", "Apache-2.0", "yes"]
    assert [line.split()[0] for line in lines[-2:]] == ["folder", "x"]
    row = next(line for line in lines if line.startswith("g1-0.1b"))
    assert row.endswith("0.2 B       0.4 GB   0.8 GB   8,192    Apache-2.0  yes")
    assert len(lines) == 4 + len(catalog.published())
    assert max(map(len, lines)) < 80
    assert all(line == line.rstrip() for line in lines)
    listed = {about["name"]: about for about in json.loads(command("list", "--json")[1])}
    assert listed["g1-0.1b"]["path"] == str(models / model.file)
    assert listed["g1-7.2b"]["path"] is None
    assert listed["g1-7.2b"]["size"] == 2 * 7_199_000_000

    for name in ("g1-0.1b", "x", "folder"):
        assert command("rm", name) == (0, "", "")
        refused(command("rm", name), f"{name}: no such model in {models}")
    assert not list(models.iterdir())
    for name in ("bundled", "../data", str(folder / "m.pth")):
        refused(command("rm", name), "no such model")


def test_a_local_path_comes_before_a_short_name(command, folder):
    Path("g1-1.5b").write_bytes((folder / "m.pth").read_bytes())
    assert command("info", "g1-1.5b")[0] == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("g1-1b", "; did you mean g1-1.5b? `heronry list` shows the short names of models"),
        ("bundeld", "; did you mean bundled? `heronry list` shows the short names of models"),
        ("storyteller", "; `heronry list` shows the short names of models"),
        ("rwkv-7.pth", ""),
        ("./g1-1b", ""),
    ],
)
def test_a_misspelt_name(command, name, hint):
    for words in (("generate", "x", "-m", name), ("info", name), ("convert", name, "out.pth")):
        refused(command(*words), f"heronry: {name}: no such file or folder{hint}\n")


def test_the_table():
    rows = json.loads((Path(heronry.__file__).parent / "published.json").read_text())
    assert len({row["name"] for row in rows}) == len({row["file"] for row in rows}) == len(rows)
    for model in catalog.published().values():
        assert str(model.context) in re.findall(r"ctx(\d+)", model.file)
        assert model.size < model.memory < 1.1 * model.size + 500e6
        assert hub.is_name(f"hf://{model.repository}/{model.file}")


# Defaults


def test_defaults_of_file_and_environment(command, folder, configure, monkeypatch):
    words = ("generate", "Hello", "--max-tokens", 5, "--seed", 1)
    wanted = command(*words, "-m", folder / "m.pth", "--dtype", "bfloat16")
    assert wanted[0] == 0
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    configure(f'model = "{folder / "m.pth"}"\ndtype = "bfloat16"\nthreads = 2\n')
    assert command(*words) == wanted
    monkeypatch.setenv("HERONRY_THREADS", "3")
    assert command(*words) == wanted
    assert command(*words, "--threads", 1) == wanted
    assert threads == [2, 3, 1]
    configure('model = "nothing"')
    refused(command(*words), "nothing: no such file or folder")
    monkeypatch.setenv("HERONRY_MODEL", str(folder / "m.pth"))
    monkeypatch.setenv("HERONRY_DTYPE", "bfloat16")
    assert command(*words) == wanted
    monkeypatch.setenv("HERONRY_DEVICE", "moon")
    refused(command(*words), "device moon")
    # what is written has the dtype that the command says
    assert command("quantize", folder / "m.pth", "q")[0] == 0
    assert heronry.load("q").dtype == torch.float32


def test_defaults_of_sampling(command, folder, configure, tmp_path):
    words = ("generate", "Hello", "-m", folder / "m.pth", "--seed", 1)
    wanted = command(*words, "--temperature", 0.5, "--top-p", 1, "--max-tokens", 5)
    configure("temperature = 0.5\ntop_p = 1\nmax_tokens = 5")
    assert command(*words) == wanted
    assert command("chat", "-m", folder / "m.pth", stdin="/set temperature\n")[2] == "temperature 0.5\n"
    configure("top_p = 3")
    refused(command(*words), f"--top-p must be a number from 0 to 1, got 3.0 (top_p comes from {tmp_path}/config")


def test_short_names_of_dtypes(command, folder):
    for short, name in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("fp64", "float64")):
        assert heronry.load(folder / "m.pth", dtype=short).dtype == getattr(torch, name)
        assert command("convert", folder / "m.pth", f"{short}.pth", "--dtype", short)[0] == 0
        assert heronry.load(f"{short}.pth").dtype == getattr(torch, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature = 'hot'", "config.toml: temperature must be a number, got 'hot'"),
        ("modle = 3", "config.toml: unknown setting 'modle'; did you mean 'model'?"),
        ("threads = 'four'", "config.toml: threads must be a whole number, got 'four'"),
        ("threads = true", "config.toml: threads must be a whole number, got True"),
        ("threads = 1e3", "config.toml: threads must be a whole number, got 1000.0"),
        ("model = 3", "config.toml: model must be a text, got 3"),
        ("model", "config.toml: not a TOML file"),
        ("model = 'a'\nmodel = 'b'", "config.toml: not a TOML file"),
        ("model = " + "[" * 100_000, "config.toml: not a TOML file"),
        (b"model = '\xe9'", "config.toml: not a TOML file"),
        ("[chat]\nmodel = 'a'", "config.toml: unknown setting 'chat'; choose from model, dtype"),
    ],
)
def test_a_wrong_configuration(command, configure, text, message):
    configure(text)
    refused(command("generate", "x"), message)
    refused(command("list"), message)
    for words in (["--help"], ["generate", "--help"], ["train", "-h"]):
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        assert "Usage: heronry" in out


def test_an_error_names_the_place_of_a_default(command, configure, folder, monkeypatch, tmp_path):
    """Only where it speaks of the default, and not where an option has taken its place."""
    file = tmp_path / "config" / "heronry" / "config.toml"
    configure('\ufeffmodel = "nothing"\r\nthreads = 0\r\n')
    words = ("generate", "x", "--max-tokens", 1)
    refused(
        command(*words),
        f"Invalid value for '--threads': Input should be greater than or equal to 1; it comes from {file}\n",
    )
    monkeypatch.setenv("HERONRY_THREADS", "many")
    message = "Invalid value for '--threads': Input should be a valid integer, unable to parse string as an integer"
    refused(command(*words), f"{message}; it comes from HERONRY_THREADS\n")
    refused(command(*words, "--threads", "few"), f"{message}; see heronry generate --help\n")
    monkeypatch.setenv("HERONRY_THREADS", "")  # as if it was not set
    words = (*words, "--threads", 1)
    refused(
        command(*words),
        f"nothing: no such file or folder; `heronry list` shows the short names of models (model comes from {file})\n",
    )
    refused(
        command(*words, "-m", "none"),
        "heronry: none: no such file or folder; `heronry list` shows the short names of models\n",
    )
    monkeypatch.setenv("HERONRY_MODEL", "nowhere")
    refused(
        command(*words),
        "nowhere: no such file or folder; `heronry list` shows the short names of models "
        "(model comes from HERONRY_MODEL)\n",
    )
    words = (*words, "-m", folder / "m.pth")
    configure('dtype = "int3"')
    refused(
        command(*words),
        f"dtype int3 is not supported; choose one of float64, float32, bfloat16, float16 (dtype comes from {file})\n",
    )
    assert command(*words, "--dtype", "float32")[0] == 0
    configure(r'model = "a\u0000b"')
    monkeypatch.delenv("HERONRY_MODEL")
    refused(
        command("generate", "x"),
        "a␀b: no such file or folder; `heronry list` shows the short names of models (model comes from ",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows looks for them elsewhere")
def test_no_home_directory(command, folder, monkeypatch):
    """No configuration and no downloaded models: the bundled model and local files are there all the same."""
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/proc/self/nothing")
    assert command("list")[0] == 0
    assert command("generate", "x", "-m", folder / "m.pth", "--max-tokens", 1)[0] == 0
    (folder / "file").write_text("")
    monkeypatch.setenv("HOME", str(folder / "file"))
    assert command("list")[0] == 0
    for words in (("--state", "~nobody7/x"), ("-m", "~nobody7/x")):
        refused(command("generate", "x", *words), "there is no such home directory; write the path without ~")
