"""What `heronry data` and `heronry train` do where they cannot write: one line and exit code 2, or they go on where the
documentation promises it. Nothing that was there is lost, and once there is space the same command succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from heronry.data.token_file import TokenFile

TEXT = "A heron stands in the reeds. " * 10_000  # 290,000 bytes
SIZES = ["model.n_layer=1", "model.n_embd=64", "data.ctx_len=32", "run.batch=2", "run.precision=float32"]
RUN = [*SIZES, "data.order=random", "run.steps=4", "run.save_every=2", "run.log_every=1", "run.sample_every=0"]


def heronry(*words: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, whose files may not grow beyond `limit` bytes."""
    code = """
        import resource, signal, sys
        from heronry.__main__ import main
        limit = int(sys.argv.pop(1))
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(limit or 0), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(TEXT)
    done = heronry("data", folder / "a.txt", "-o", folder / "x", "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    return folder / "x"


def fill(folder: Path) -> Path:
    """A file that leaves no space."""
    try:
        with open(folder / "filled", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return folder / "filled"


def command_for(what: str, tokens: Path, out: Path) -> list[object]:
    if what == "data":
        return ["data", tokens.with_name("a.txt"), "-o", out, "--tokenizer", "bytes"]
    return ["train", f"data.train={tokens}", f"run.out={out}", *RUN]


PLACES: dict[str, tuple[Callable[[Path, Callable[[str], Path]], Path], str]] = {
    "read-only": (lambda path, mount: mount("ro,size=1m") / "out", "Read-only file system"),
    "below a file": (lambda path, mount: path / "file" / "out", "Not a directory"),
    "in /proc": (lambda path, mount: Path("/proc/heronry/out"), "No such file or directory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "train"])
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written(what, place, tokens, tmp_path, mount):
    (tmp_path / "file").write_text("kept")
    where, reason = PLACES[place]
    out = where(tmp_path, mount)
    done = heronry(*command_for(what, tokens, out))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"heronry: {out}: cannot be written ({reason})\n"
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("limit", [None, 50_000])
def test_data_on_a_full_disk(limit, tokens, tmp_path, mount):
    """A full file system, and a limit on the size of a file."""
    folder = tmp_path if limit else mount("size=300k")
    (folder / "b.jsonl").write_text('{"text": "kept"}\n')
    words = ["data", folder / "b.jsonl", "-o", folder / "x", "--tokenizer", "bytes"]
    assert heronry(*words).returncode == 0
    before = (folder / "x.bin").read_bytes()
    again = [*command_for("data", tokens, folder / "x"), "--restart"]
    done = heronry(*again, limit=limit)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "File too large" if limit else "No space left on device"
    assert done.stderr == f"heronry: {folder / 'x'}: cannot be written ({reason})\n"
    assert (folder / "x.bin").read_bytes() == before
    assert len(TokenFile(folder / "x")) == 1
    if not limit:
        subprocess.run(["mount", "-o", "remount,size=9m", str(folder)], check=True)
    done = heronry(*again[:-1])  # goes on where it was
    assert done.returncode == 0, done.stderr
    assert (folder / "x.bin").read_bytes() == tokens.with_suffix(".bin").read_bytes()


@pytest.mark.slow
def test_training_on_a_disk_that_is_full_at_once(tokens, mount):
    """The run goes on to its end, as it promises, and says that nothing could be kept."""
    folder = mount("size=64k")
    filled = fill(folder)
    words = command_for("train", tokens, folder / "out")
    done = heronry(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("no checkpoint at step ") == 2
    assert done.stderr.count("could not be logged: [Errno 28] No space left on device") == 4
    assert done.stderr.count("TensorBoard gets no more lines: [Errno 28] No space left on device") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"heronry: {folder / 'out'}: cannot be written (")
    assert last.endswith("; the same command tries again")
    filled.unlink()
    subprocess.run(["mount", "-o", "remount,size=9m", str(folder)], check=True)
    assert heronry(*words).returncode == 0


@pytest.mark.slow
def test_training_on_a_disk_that_fills_up_keeps_what_there_is(tokens, mount):
    folder = mount("size=9m")
    out = folder / "out"
    words = command_for("train", tokens, out)
    assert heronry(*words, "run.steps=2").returncode == 0
    (out / "model.safetensors").unlink()
    kept = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    filled = fill(folder)
    done = heronry(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == kept
    filled.unlink()
    done = heronry(*words)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stderr
    assert (out / "model.safetensors").is_file()
