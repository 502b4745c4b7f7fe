"""What is wrong with the machine becomes one line and an exit code, in every command; what was there before stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faulty import run
from safetensors.torch import save_file

import heronry
from heronry.adapters import save_adapter
from heronry.adapters.inject import inject_adapter
from heronry.cli.app import COMMANDS
from heronry.models import vision

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither limits nor /dev/full")

SMALL = {"vocab": 256, "width": 64, "heads": 1, "layers": 2, "ffn": 64, "rank": 32}
LIMIT = 600  # bytes of a file: less than a model, more than a message

# what writes a file: the words of the command, and the file or folder
WRITERS = {
    "pth": ("convert m.pth OUT.pth --force", "OUT.pth"),
    "safetensors": ("convert m.pth OUT.safetensors --force", "OUT.safetensors"),
    "webrwkv": ("convert m.pth OUT.st --force", "OUT.st"),
    "folder": ("convert m.pth OUT --force", "OUT"),
    "huggingface": ("convert m.pth OUT --to huggingface --force", "OUT"),
    "quantize": ("quantize m.pth OUT --force", "OUT"),
    "merge": ("merge m.pth adapter OUT --force", "OUT"),
    "data": ("data t.txt -o OUT --tokenizer bytes --restart", "OUT.bin"),
    "generate": ("generate x -m m.pth --max-tokens 3 --save-state OUT --force", "OUT"),
    "see": (f"see {'p.png ' * 40} -m v.safetensors --features OUT --force", "OUT"),
    "chat": ("chat -m m.pth --max-tokens 3 --session OUT", "OUT"),
    "view": ("view decay -m m.pth --tokenizer bytes --out OUT.png --force", "OUT.png"),
}
SLOW_WRITERS = {
    "gguf": ("convert m.pth OUT.gguf --force", "OUT.gguf"),
    "ggml": ("convert m.pth OUT.bin --force", "OUT.bin"),
    "train": ("train data.train=tokens model.n_layer=1 model.n_embd=64 run.steps=3 run.out=OUT", "OUT"),
    "bench": ("bench machine --quick --json OUT", "OUT"),
    "compare": ("compare --quick --text t.txt --out OUT.html --force", "OUT.html"),
}
# what prints on standard output
PRINTERS = {
    "generate": "generate x -m m.pth --max-tokens 300",
    "chat": "chat -m m.pth --max-tokens 50",
    "info": "info m.pth",
    "list": "list",
    "eval": "eval t.txt -m m.pth",
    "see": "see p.png -m v.safetensors",
    "merge": "merge m.pth adapter merged --force",
    "help": "--help",
    "version": "--version",
}
# what reads a model
LOADERS = {
    "generate": "generate x --max-tokens 3",
    "chat": "chat --max-tokens 3",
    "info": "info bundled",
    "quantize": "quantize bundled out --force",
    "convert": "convert bundled out.pth --force",
    "merge": "merge bundled of_bundled out --force",
    "eval": "eval t.txt",
    "see": "see p.png -m v.safetensors",
    "data": "data t.txt -o big --tokenizer world --restart",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_checkpoint) -> Path:
    """A model, an adapter, a picture model, a picture and a text."""
    from PIL import Image

    path = tmp_path_factory.mktemp("faults")
    torch.save(random_checkpoint("7", **SMALL), path / "m.pth")
    model = inject_adapter(heronry.load(path / "m.pth"), 2, 2)
    save_adapter(model, path / "adapter")
    bundled = inject_adapter(heronry.load("bundled", "float32"), 2, 2)
    save_adapter(bundled, path / "of_bundled")
    torch.manual_seed(0)
    pictures = vision.create("vrwkv_tiny", image_size=32, num_classes=3, n_layer=1)
    save_file({name: x.contiguous() for name, x in pictures.state_dict().items()}, path / "v.safetensors")
    Image.new("RGB", (40, 40)).save(path / "p.png")
    (path / "t.txt").write_text("hello world " * 2000)
    assert run(path, *words("data t.txt -o tokens --tokenizer bytes")).code == 0
    return path


def words(line: str, out: str = "out") -> list[str]:
    return line.replace("OUT", out).split()


def content(path: Path) -> dict[str, bytes]:
    """Every file at or below a path."""
    files = [path] if path.is_file() else [x for x in path.rglob("*") if x.is_file()]
    return {str(x): x.read_bytes() for x in files}


def write_something(target: Path) -> dict[str, bytes]:
    """An older file or model under that name."""
    if target.suffix or target.name in ("generate", "see", "chat"):
        target.write_bytes(b"what was here before")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"what was here before")
    return content(target)


def test_every_command_is_in_a_table():
    lines = [line for line, _ in (*WRITERS.values(), *SLOW_WRITERS.values())] + [*PRINTERS.values(), *LOADERS.values()]
    named = {line.split()[0] for line in lines}
    assert {function.__name__ for function in COMMANDS} - named == {
        "pull",
        "rm",
        "serve",
    }  # test_models.py, tests/serve


@pytest.mark.parametrize("name", [*WRITERS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_WRITERS)])
def test_no_space_left(folder, name):
    line, target = (WRITERS | SLOW_WRITERS)[name]
    target = target.replace("OUT", name)
    before = {} if name in ("chat", "train", "bench") else write_something(folder / target)
    limit = 20_000 if name == "train" else LIMIT  # which says more on standard error
    done = run(folder, *words(line, name), file_size=limit, stdin="Hello\n")
    if name == "train":  # its log goes on without what could not be written
        assert done.code == 2
        assert done.err.splitlines()[-1].startswith("heronry: ")
    else:
        done.is_refusal("File too large")
        assert name in done.err
    if before:
        assert content(folder / target) == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(f".{name}") and path.is_file()]


@pytest.mark.parametrize("limit", [3_000, 70_000, 400_000])
@pytest.mark.parametrize("line", ["convert m.pth piece.pth", "convert v.safetensors piece.pth", "quantize m.pth piece"])
def test_space_for_a_part_only(folder, line, limit):
    """torch then has other words for it."""
    if line.startswith("quantize"):
        limit //= 4
    run(folder, *line.split(), file_size=limit).is_refusal("piece", "File too large")
    assert not [path.name for path in folder.iterdir() if "piece" in path.name and path.is_file()]


@pytest.fixture
def mounted(tmp_path):
    """A file system of 24 KiB, and a function to make it read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield path, lambda: subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_and_a_read_only_disk(folder, name, mounted):
    disk, make_read_only = mounted
    line, _ = WRITERS[name]
    done = run(folder, *words(line, str(disk / name)), stdin="Hello\n")
    done.is_refusal(str(disk))
    assert re.search(r"No space left|needs [\d.]+ MB, but .* has only 0 MB left", done.err)
    assert all(path.name.startswith(("data.", ".folder", ".huggingface")) or path.is_dir() for path in disk.iterdir())
    subprocess.run(f"rm -rf {disk}/* {disk}/.[a-z]*", shell=True, check=True)
    make_read_only()
    done = run(folder, *words(line, str(disk / name)), stdin="Hello\n")
    done.is_refusal(str(disk))
    assert re.search(r"Read-only file system|has only 0 MB left", done.err)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_a_folder_should_be(folder, name):
    line, _ = WRITERS[name]
    done = run(folder, *words(line, f"t.txt/{name}"), stdin="Hello\n")
    done.is_refusal("t.txt")
    assert re.search("Not a directory|not a folder", done.err)


def test_a_session_that_cannot_be_written_is_told_before_the_first_message(folder):
    for session, message in (
        ("/proc/talk", "/proc/talk: No such file or directory"),
        ("t.txt/talk", "t.txt/talk: Not a directory"),
    ):
        done = run(folder, "chat", "-m", "nothing", "--session", session, stdin="")
        done.is_refusal(message)


@pytest.mark.parametrize("name", PRINTERS)
def test_output_that_cannot_be_written(folder, name):
    line = PRINTERS[name].split()
    run(folder, *line, stdout="/dev/full", stdin="Hello\n").is_refusal("No space left on device")
    run(folder, *line, stdout="closed", stdin="Hello\n").is_refusal("standard input or output is closed")
    gone = run(folder, *line, stdout="pipe", stdin="Hello\n")
    assert (gone.code, gone.err) == (141, "")  # as for a program that SIGPIPE has ended


@pytest.mark.parametrize("line", ["generate - -m m.pth", "chat -m m.pth"])
def test_closed_input(folder, line):
    run(folder, *line.split(), stdin="closed").is_refusal("standard input or output is closed")


@pytest.mark.parametrize("stderr", ["/dev/full", "closed", "pipe"])
def test_errors_that_cannot_be_written(folder, stderr):
    done = run(folder, "info", "missing", stderr=stderr)
    assert (done.code, done.out, done.err) == (2, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("memory", [4 << 20, 12 << 20])  # it depends on the heap whether that is enough
def test_no_memory(folder, name, memory):
    done = run(folder, *LOADERS[name].split(), memory=memory, stdin="Hello\n")
    if done.code:
        done.is_refusal("there is not enough memory")


@pytest.mark.parametrize("kilobytes", [100_000, 400_000])
def test_no_memory_for_pytorch_itself(folder, kilobytes):
    line = f"ulimit -v {kilobytes}; exec {sys.executable} -m heronry generate x"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "heronry: there is not enough memory\n")


@pytest.mark.parametrize(
    "line", ["generate x -m m.pth --max-tokens 100000 --echo", "chat -m m.pth --max-tokens 100000"]
)
@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(folder, line, number, code, message):
    done = run(folder, *line.split(), stdin="Hello\n", kill=(number, "e"))
    assert (done.code, done.err) == (code, f"heronry: {message}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_session_keeps_what_was_said_before_a_signal(folder, number):
    line = f"chat -m m.pth --max-tokens 100000 --session talk{number}"  # a new one shows nothing but the answer
    done = run(folder, *words(line), stdin="Hi\n", kill=(number, "e"))
    assert done.code in (130, 143)
    chat = heronry.LLM(folder / "m.pth").chat()
    chat.load(folder / f"talk{number}")
    assert len(chat.messages[-1]["content"]) > 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate --prompt-file adapter -m m.pth", "adapter: Is a directory"),
        ("generate --prompt-file nothing -m m.pth", "nothing: No such file or directory"),
        ("eval adapter -m m.pth", "adapter"),
        ("info t.txt", "t.txt: not a .pth"),
        ("info adapter/nothing", "no such file or folder"),
        ("chat -m m.pth --session adapter", "adapter: no such conversation file"),
        ("chat -m m.pth --session t.txt", "t.txt: not a heronry conversation"),
        ("data adapter/adapter_config.json -o x", "adapter_config.json"),
        ("see t.txt -m v.safetensors", "t.txt"),
        ("merge m.pth t.txt x --alpha 1", "t.txt"),
    ],
)
def test_wrong_inputs(folder, line, message):
    run(folder, *line.split(), stdin="Hello\n").is_refusal(message)


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read and write everything")
def test_no_permission(folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    for line, _ in WRITERS.values():
        run(folder, *words(line, str(closed / "x")), stdin="Hello\n").is_refusal("Permission denied")
