"""What people expect of a command line: short names, defaults, --json, --force, one line for a typing error."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import heronry
from heronry import LLM, State, catalog, hub
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.bench.topics import TOPICS
from heronry.checkpoint import save_time_state
from heronry.cli import app as app_file
from heronry.convert import target_formats
from heronry.text.chat_templates import TEMPLATES

SMALL = {"vocab": 256, "width": 64, "heads": 1, "layers": 2, "ffn": 64, "rank": 32}
STATE = 2 * (2 * 64 + 64 * 64) * 4  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_checkpoint) -> Path:
    path = tmp_path_factory.mktemp("models")
    torch.save(random_checkpoint("7", **SMALL), path / "m.pth")
    (path / "t.txt").write_text("hello world")
    return path


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No configuration and no models of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("HERONRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("heronry").setLevel(logging.NOTSET)


@pytest.fixture
def configure(tmp_path):
    def write(text: str) -> None:
        file = tmp_path / "config" / "heronry" / "config.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    return write


def refused(done, message: str) -> None:
    code, out, err = done
    assert (code, out) == (2, "")
    assert err.startswith("heronry: ")
    assert err.count("\n") == 1
    assert message in err


# Typing


def test_version_and_short_help(command):
    assert command("--version") == (0, f"heronry {heronry.__version__}\n", "")
    assert command("-h") == command("--help")
    assert "--install-completion" in command("-h")[1]
    assert command("generate", "-h")[1] == command("generate", "--help")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate x --hlp", "No such option"),
        ("generate x --max-tokens many", "--max-tokens"),
        ("generate x --threads 0", "--threads"),
        ("generate a b", "unexpected extra argument"),
        ("convert a", "Missing argument"),
        ("gnerate x", "No such command 'gnerate'. Did you mean 'generate'"),
        ("generate", "give a PROMPT or --prompt-file"),
        ("generate x --prompt-file y", "give a PROMPT or --prompt-file, not both"),
        ("info a --model b", "give FILE or --model, not both"),
        ("generate x --model bundled --max-tokens -3", "heronry: --max-tokens must be a whole number"),
        ("generate x --top-p 2", "heronry: --top-p must be"),
        ("generate x --order up", "heronry: --order must be"),
    ],
)
def test_a_typing_error_is_one_line(command, line, message):
    refused(command(*line.split()), message)


def test_messages_speak_of_options():
    names = ("max_tokens", "tokenizer", "stop", "alpha")
    for message, expected in [
        ("max_tokens must be 3", "--max-tokens must be 3"),
        ("supply one with tokenizer=", "supply one with --tokenizer"),
        ("trained with (tokenizer= or --tokenizer)", "trained with (--tokenizer)"),
        ("give alpha (alpha=)", "give alpha (--alpha)"),
        ("x: reads pictures, not text; load it with kind=VisionModel", "x: reads pictures, not text"),
        ("/a/tokenizer=b/c: no such file", "/a/tokenizer=b/c: no such file"),
        ("a stop string must not be empty", "a stop string must not be empty"),
    ]:
        assert app_file._as_typed(message, names) == expected


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["fly"], ["generate", "x", "--hlp"], ["--version"], ["list"]]
)
def test_what_needs_no_model_imports_nothing_heavy(words):
    code = (
        "import atexit, sys\n"
        f"sys.argv[1:] = {words!r}\n"
        "from heronry.__main__ import main\n"
        "heavy = {'torch', 'numpy', 'rich', 'prompt_toolkit', 'huggingface_hub', 'safetensors', 'tokenizers'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_completion():
    code = "import sys; sys.argv = ['heronry']; from heronry.__main__ import main; main()"
    environment = os.environ | {"_HERONRY_COMPLETE": "complete_bash", "COMP_WORDS": "heronry gen", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["generate"]


def test_help_lists_what_there_is(command):
    def listed(name: str, option: str) -> set[str]:
        text = " ".join(command(name, "--help")[1].split())
        return set(re.findall(r"[\w-]+", re.search(rf"{option} (.*?)( --|\[default|$)", text)[1]))

    for line in ("chat", "data"):
        assert set(TEMPLATES) <= listed(line, "--template")
    assert set(target_formats.ALL) <= listed("convert", "--to")
    assert set(TOPICS) <= listed("bench", r"Arguments: \S+")


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
    assert lines[0].split() == ["name", "generation", "parameters", "size", "memory", "context", "licence", "here"]
    assert [line.split()[0] for line in lines[1:4]] == ["bundled", "folder", "x"]
    row = next(line for line in lines if line.startswith("g1-0.1b"))
    assert row.endswith(f"0.2 B       0.4 GB   0.8 GB   8,192    Apache-2.0  {models / model.file}")
    assert len(lines) == 4 + len(catalog.published())
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 3", "config.toml: unknown setting 'modle'; did you mean 'model'?"),
        ("threads = 'four'", "config.toml: threads must be a whole number, got 'four'"),
        ("threads = true", "config.toml: threads must be a whole number, got True"),
        ("model = 3", "config.toml: model must be a text, got 3"),
        ("model", "config.toml: not a TOML file"),
    ],
)
def test_a_wrong_configuration(command, configure, text, message):
    configure(text)
    refused(command("generate", "x"), message)
    assert command("--help")[0] == 0


# generate


def test_json_prompt_file_and_saved_state(command, folder):
    words = ("-m", folder / "m.pth", "--max-tokens", 6, "--temperature", 0)
    text = command("generate", "Hello", *words)[1].removesuffix("\n")
    Path("prompt.txt").write_text("Hello\n")
    code, out, err = command("generate", "--prompt-file", "prompt.txt", *words, "--json", "--save-state", "s")
    assert (code, err, out.count("\n")) == (0, "", 1)
    about = json.loads(out)
    assert about["prompt"] == "Hello"
    assert about["text"] == LLM(folder / "m.pth").generate("Hello", 6, temperature=0).text
    assert about["text"].encode(errors="replace") == text.encode(errors="replace")
    assert about["finish_reason"] == "length"
    assert about["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert len(about["token_ids"]) == 6
    state = State.load("s")
    assert state.texts[0].startswith("Hello")
    llm = LLM(folder / "m.pth")
    more = command("generate", "!", *words, "--state", "s")
    assert more[1] == str(llm.generate("!", 6, temperature=0, state=state)) + "\n"
    before = Path("s").read_bytes()
    refused(command("generate", "x", *words, "--save-state", "s"), "s: already exists; replace it with --force")
    assert Path("s").read_bytes() == before
    assert command("generate", "x", *words, "--save-state", "s", "--force")[0] == 0
    assert State.load("s").texts[0].startswith("x")
    Path("latin").write_bytes(b"caf\xe9")
    refused(command("generate", "--prompt-file", "latin", *words), "latin: byte 3 is not UTF-8")
    refused(command("generate", "", *words), "heronry: the prompt is empty\n")
    refused(command("generate", "", *words, "--state", "s"), "a state alone does not say what comes next")


def test_a_stop_may_be_a_line_break(command, monkeypatch):
    seen = {}
    monkeypatch.setattr(LLM, "generate", lambda self, prompt, n, **options: seen.update(options) or iter(()))
    assert command("generate", "x", "--stop", r"\n", "--stop", r"a\\n", "--stop", r"\tü\x")[0] == 0
    assert seen["stop"] == ["\n", r"a\n", "\tü\\x"]


@pytest.mark.slow
def test_nothing_comes_between_the_prompt_and_the_text(tmp_path):
    """The first step may say that it compiles."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "heronry", "generate", "Once", "--echo", "--max-tokens", "3", "--seed", "1"]
    both = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment).stdout
    assert both.splitlines()[-1].startswith("Once ")


# What commands say


def test_quiet_and_verbose(command, folder):
    words = ("quantize", folder / "m.pth")
    assert "of the original" in command(*words, "a")[2]
    assert command(*words, "b", "--quiet") == (0, "", "")
    assert command(*words, "c", "-q") == (0, "", "")
    code, _, err = command("info", "nothing", "-v")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1] == "heronry: nothing: no such file or folder"
    refused(command("info", "nothing"), "nothing: no such file")


@pytest.mark.parametrize(
    "line", ["convert m.pth o.st -q", "convert m.pth o.pth", "quantize m.pth q -f int4", "eval t.txt -m m.pth"]
)
def test_no_bar_without_a_terminal(command, folder, monkeypatch, line):
    monkeypatch.setattr("heronry.cli.progress.PATIENCE", -1)
    words = [str(folder / word) if (folder / word).exists() else word for word in line.split()]
    code, _, err = command(*words)
    assert code == 0
    assert err.count("\n") <= 1
    assert "\x1b" not in err


# What exists


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("convert m.pth OUT", "o.pth"),
        ("convert m.pth OUT", "o"),
        ("convert m.pth OUT --to huggingface", "o"),
        ("quantize m.pth OUT", "o"),
        ("merge m.pth adapter OUT", "o"),
    ],
)
def test_one_rule_for_what_exists(command, folder, line, target):
    save_adapter(inject_adapter(heronry.load(folder / "m.pth"), 2, 2), folder / "adapter")
    words = [str(folder / word) if (folder / word).exists() else word for word in line.replace("OUT", target).split()]
    assert command(*words)[0] == 0
    refused(command(*words), f"{target}: already exists; replace it with --force")
    if target == "o":
        Path("o", "old.txt").write_text("of before")
    again = command(*words, "--force")
    assert again[0] == 0, again
    assert heronry.load(target).num_parameters() == heronry.load(folder / "m.pth").num_parameters()
    assert sorted(path.name for path in Path().iterdir()) == [target]
    # a folder that is no model is never replaced
    Path("photos").mkdir()
    Path("photos", "a.jpg").write_text("a")
    words = [word.replace(target, "photos") if word == target else word for word in words]
    if target == "o":
        refused(command(*words, "--force"), "photos: is a folder with other files; choose another name")
    assert Path("photos", "a.jpg").read_text() == "a"


def test_a_model_is_not_replaced_by_itself(command, folder):
    heronry.save(heronry.load(folder / "m.pth"), "m")
    for line in ("convert m m --force", "quantize m m --force"):
        refused(command(*line.split()), "m: is the original itself")
    assert heronry.load("m").num_parameters() == heronry.load(folder / "m.pth").num_parameters()


# info


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


def test_damaged_files_of_every_kind(command, folder):
    LLM(folder / "m.pth").state("a").save("state")
    whole = Path("state").read_bytes()
    Path("state").write_bytes(whole[: len(whole) // 2])
    refused(command("info", "state"), "state: ")
    Path("talk").write_bytes(b"heronry.chat 2\nrubbish")
    refused(command("info", "talk"), "talk: damaged or truncated conversation file")
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("[]")
    refused(command("info", "adapter"), "adapter_config.json: not the settings of an adapter")


# chat without a terminal


def test_settings_and_branches_of_a_pipe(command, folder):
    lines = [
        "/set max_tokens 2",
        "/set temperature 0",
        "/set",
        "Hi",
        "/clear",
        "/history",
        "/system Be brief.",
        "/system",
    ]
    code, out, err = command("chat", "-m", folder / "m.pth", "--template", "world", stdin="\n".join(lines))
    assert (code, err) == (0, "")
    assert "max_tokens 2\n" in out
    assert "temperature 0.0\n" in out
    assert "a new branch, 2; /switch main goes back" in out
    assert out.endswith("Be brief.\n")
    lines = ["/set heat 3", "/set top_k x", "/set top_p 2", "/set order up"]
    code, out, err = command("chat", "-m", folder / "m.pth", stdin="\n".join(lines))
    assert (code, out) == (2, "")
    assert [line.partition(" ")[0] for line in err.splitlines()] == ["heronry:"] * 4


def test_many_lines_are_one_message(command, folder):
    text = '"""\none\n/two\n"""\n/history\n'
    _, out, _ = command("chat", "-m", folder / "m.pth", "--template", "story", "--max-tokens", 2, stdin=text)
    assert "user: one\n/two\n" in out


def test_a_session_cannot_be_left_by_accident(command, folder):
    words = ("chat", "-m", folder / "m.pth", "--max-tokens", 2, "--session", "talk")
    assert command(*words, stdin="Hello\n")[0] == 0
    code, out, err = command(*words, stdin="/system Be kind.\n/load talk\n/clear\n")
    assert code == 2
    assert err.count("this conversation is saved in talk: leave it") == 2
    _, out, _ = command(*words, stdin="/switch main\n")
    assert "user: Hello" in out


def test_standard_input_stays_as_it_is(command, folder, monkeypatch):
    """Bytes that are not UTF-8 are reported, not dropped."""
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["heronry", "generate", "-", "-m", str(folder / "m.pth"), "--max-tokens", "1"])
    monkeypatch.setattr(sys, "stdin", raw)
    with pytest.raises(SystemExit) as end:
        app_file.main()
    assert end.value.code == 2
