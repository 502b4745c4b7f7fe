"""Names of the hub: from its cache without a network, and what is said where there is neither."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PureWindowsPath
from threading import Thread
from typing import ClassVar

import pytest
import torch

import heronry
from heronry import InputError, hub
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


def run(code: str, cache: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    found = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=found)


@pytest.mark.parametrize(
    "name",
    [
        "hf://BlinkDL/rwkv-4-pile-169m/a.pth",
        pytest.param("hf://BlinkDL/rwkv-4-pile-169m@main/a.pth", marks=pytest.mark.slow),
        pytest.param("RWKV/rwkv-4-169m-pile", marks=pytest.mark.slow),
        "hf://RWKV/rwkv-4-169m-pile",
    ],
)
def test_from_the_cache_without_a_network(name, cache):
    done = run(f"import heronry; print(heronry.load({name!r}).fingerprint)", cache)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == heronry.load(cache.parent / "a.pth").fingerprint


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--model_name" in done.stderr
    done = subprocess.run(
        [*command[:-1], str(cache.parent / "a.pth" / "out")], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith("Not a directory\n")


@pytest.mark.slow
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


LOAD = """
import sys, time, heronry.checkpoint, huggingface_hub
time.sleep = lambda seconds: sys.exit(f"waits {seconds} s to try again")
try: heronry.load(sys.argv[1])
except heronry.InputError as error: print(error)
"""


@pytest.mark.slow
def test_a_hub_that_does_not_answer(cache):
    """No route, and a host that takes the call and says nothing. It is not called again and again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):
            done = run(LOAD, cache, "hf://a/b/c.pth", HF_HUB_OFFLINE="0", HF_ENDPOINT=f"http://127.0.0.1:{port}")
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
            assert done.stdout == (
                "hf://a/b/c.pth: not in the hub's cache, and the hub cannot be reached (offline, or no network)\n"
            )
        silent.setblocking(False)
        calls = []
        with suppress(BlockingIOError):
            while True:
                calls.append(silent.accept()[0])
        assert 1 <= len(calls) <= 2  # the second by huggingface_hub itself
        for call in calls:
            call.close()


@pytest.mark.parametrize(
    "code",
    [
        "from heronry.data import sources; list(sources.read_records(sources.find_sources(['hf://a/b'])))",
        "from heronry.data.image_dataset import ImageDataset; ImageDataset('hf://a/b')",
    ],
)
def test_a_data_set_without_a_network(code, cache):
    """In a line and in seconds, by the same door."""
    code = f"import sys, time, heronry\ntime.sleep = lambda _: sys.exit('waits')\ntry: {code}\n"
    done = run(
        code + "except heronry.InputError as error: print(error)",
        cache,
        HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "hf://a/b: not in the hub's cache, and the hub cannot be reached (offline, or no network)\n"


class Hub(BaseHTTPRequestHandler):
    """A hub with two repositories, and errors."""

    files: ClassVar[dict[str, bytes]] = {}  # of O/R
    status: ClassVar[int] = 200

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        name = path.removeprefix("/O/R/resolve/main/")
        if self.status != 200 or "O/R" not in path or ("resolve" in path and name not in self.files):
            code = {True: "EntryNotFound", False: "RepoNotFound"}["O/R" in path]
            if self.status != 200:
                return self.answer(b"", self.status, {})
            return self.answer(b"", 404, {"X-Error-Code": code})
        if "resolve" in path:
            return self.answer(self.files[name], 200, {"ETag": f'"{len(self.files[name])}"'})
        listed = [{"rfilename": name} for name in self.files]
        if "/tree/" in path:
            listed = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
            return self.answer(json.dumps(listed).encode(), 200, {})
        body = {"id": "O/R", "sha": COMMIT, "siblings": listed}
        return self.answer(json.dumps(body).encode(), 200, {})

    do_GET = do_HEAD

    def answer(self, body: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        more = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), "Content-Type": "application/json"}
        for key, value in (more | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def online(cache, random_checkpoint, tmp_path, monkeypatch):
    """A function that loads a name from a hub with these files: what is printed."""
    monkeypatch.setattr(Hub, "files", {"a.pth": (cache.parent / "a.pth").read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()

    def load(name: str, **environment: str) -> str:
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"} | environment
        done = run(LOAD, cache, name, **environment)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout.count("\n") <= 1
        return done.stdout.strip()

    yield load
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_names_that_are_downloaded(online, cache):
    for name in (
        "hf://O/R/a.pth",
        "hf://O/R/a",
        "hf://O/R@main/a.pth",
        "https://huggingface.co/O/R/blob/main/a.pth",
        "https://huggingface.co/O/R/resolve/main/a.pth?download=true",
    ):
        assert online(name) == "", name
        shutil.rmtree(cache / "models--O--R")


@pytest.mark.slow
def test_errors_of_the_hub_are_not_called_offline(online, cache, monkeypatch):
    assert online("hf://O/R/b.pth") == "hf://O/R/b.pth: O/R has no file b.pth"
    assert "no repository O/Q on the hub" in online("hf://O/Q/b.pth")
    for status, hint in ((500, "try again later"), (503, "try again later"), (403, "log in with `hf auth login`")):
        monkeypatch.setattr(Hub, "status", status)
        for name in ("hf://O/R/a.pth", "hf://O/R"):
            assert online(name).endswith(f"the hub answers with error {status}; {hint}"), (status, online(name))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(online, cache, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written to" in (said := online("hf://O/R/a.pth", HF_HUB_CACHE=str(tmp_path / "file")))
    assert "Not a directory" in said or "File exists" in said
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"  # as a full disk
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    online.__globals__["LOAD"], before = code + LOAD, LOAD
    try:
        assert "(File too large)" in online("hf://O/R/a.pth")
    finally:
        online.__globals__["LOAD"] = before


@pytest.mark.slow
def test_a_repository_of_single_files(online, monkeypatch):
    names = [f"RWKV-x070-World-{i:02}.pth" for i in range(11)]
    monkeypatch.setattr(Hub, "files", dict.fromkeys(["README.md", *names], b"x"))
    listed = ", ".join(f"hf://O/R/{name}" for name in names[:8])
    assert online("hf://O/R") == f"hf://O/R: holds single files, choose one: {listed} and 3 more"
    assert online("https://huggingface.co/O/R").startswith("https://huggingface.co/O/R: holds single files")
    monkeypatch.setattr(Hub, "files", {"README.md": b"x"})
    assert online("hf://O/R") == "hf://O/R: O/R holds no model"


def test_single_files_in_the_cache(cache):
    done = run(LOAD, cache, "BlinkDL/rwkv-4-pile-169m")
    assert done.stdout.strip().endswith("choose one: hf://BlinkDL/rwkv-4-pile-169m/a.pth"), done.stderr
    assert run(LOAD, cache, "hf://BlinkDL/rwkv-4-pile-169m/a").stdout == ""


def test_local_names_without_their_ending(cache):
    assert heronry.load(cache.parent / "a").fingerprint == heronry.load(cache.parent / "a.pth").fingerprint


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_name("RWKV/rwkv-4-169m-pile")
    assert hub.is_name("hf://a/b/c.pth")
    assert hub.is_name(Path("hf://a/b/c.pth"))
    assert hub.is_name(Path("https://huggingface.co/a/b"))
    for path in ("model.pth", "/abs/model", "./a/b", "a/b/c", "~/a", "a/b c"):
        assert not hub.is_name(path)
    # as the command line of Windows makes paths of them
    for path in (PureWindowsPath("RWKV/rwkv-4-169m-pile"), PureWindowsPath("hf://a/b/c.pth")):
        assert hub.is_name(path)
        assert "\\" in str(path)
    for path in (r"C:\models\a", r"C:\a", r".\a", r"\\server\a", r"a\b\c.pth"):
        assert not hub.is_name(path)
        assert not hub.is_name(PureWindowsPath(path))
    assert hub._parse(PureWindowsPath("hf://a/b@x/c/d.pth")) == ("a/b", "x", "c/d.pth")
    assert hub._parse("https://huggingface.co/a/b/blob/refs%2Fpr%2F1/c%20d.pth") == ("a/b", "refs/pr/1", "c d.pth")
    with pytest.raises(InputError, match="give hf://OWNER/REPOSITORY"):
        hub.fetch("https://example.com/a/b")
    (tmp_path / "runs").mkdir()
    assert not hub.is_name("runs/typo")
