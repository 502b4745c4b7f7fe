"""`heronry data --cluster`: a real Ray with two workers on this machine gives the bytes of one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from heronry import InputError
from heronry.cluster import connect
from heronry.data import encoding
from heronry.data.tokenize_corpus import tokenize_corpus


def write(folder: Path) -> list[str]:
    folder.mkdir()
    for number in range(5):
        lines = [json.dumps({"text": f"line {i} of {number}. " * (i % 7)}) for i in range(200)]
        lines.insert(77, '{"text": 1}')
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    (folder / "talks.json").write_text(json.dumps([{"conversations": talk}] * 30))
    (folder / "text.txt").write_text("A heron stands in the reeds.\n" * 9000)
    return [str(folder)]


@pytest.fixture
def local_ray():
    """Two workers, for all runs of a test."""
    ray = pytest.importorskip("ray", reason="make test-cluster installs Ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray
    ray.shutdown()


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_two_workers_make_the_bytes_of_one_process(tmp_path, monkeypatch, local_ray):
    sources = write(tmp_path / "texts")
    options = {"template": "g1", "skip_bad": True, "holdout": 0.1}
    whole = tokenize_corpus(sources, tmp_path / "here" / "x", "world", **options)
    assert whole.skipped.rows == 5
    spread = tokenize_corpus(sources, tmp_path / "there" / "x", "world", **options, cluster="local", workers=2)
    assert spread == whole
    assert made(tmp_path / "here") == made(tmp_path / "there")

    def stop(n_bytes, progress):
        if progress.position.source == 2 and progress.position.record > 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "CHUNK", 2000)

    with pytest.raises(KeyboardInterrupt):  # here, and it resumes there
        tokenize_corpus(sources, tmp_path / "both" / "x", "world", **options, on_progress=stop)
    tokenize_corpus(sources, tmp_path / "both" / "x", "world", **options, cluster="local", workers=2)
    assert made(tmp_path / "here") == made(tmp_path / "both")
    message = r"0.jsonl, line 78: 'text' is neither a string nor a list of messages"
    with pytest.raises(InputError, match=message):  # as without a cluster, in the order of the sources
        tokenize_corpus(sources, tmp_path / "bad" / "x", "world", template="g1", cluster="local", workers=2)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_line_says_how_to_get_it(tmp_path, command):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    words = ("data", tmp_path / "a.jsonl", "-o", tmp_path / "x", "--tokenizer", "bytes")
    message = "heronry: --cluster needs Ray: pip install 'heronry[cluster]'\n"
    assert command(*words, "--cluster", "local") == (2, "", message)
    assert command(*words)[0] == 0  # and it is not in the way afterwards


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_named_at_once(address):
    with pytest.raises(InputError, match=rf"^--cluster {address}: nothing answers there \(.*\)$"):
        connect(address)
