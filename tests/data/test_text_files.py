"""The reader of texts, through both of its users: what `heronry data` encodes is what `heronry eval` measures."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest

from heronry import InputError
from heronry.data import sources
from heronry.data.sources import find_sources, read_records
from heronry.data.text_files import TextFile, read_text
from heronry.evaluate import read_texts

BOM = b"\xef\xbb\xbf"
TEXTS = ["One day\u2028a cat.", "One day\u2029a cat.", "One day\u0085a cat.", "One\r\nday\ta \x0b\x0c\x1c cat.", "鳥\n"]


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read_by_both(file: Path) -> list[str]:
    texts = read_texts(file)
    assert [record.content for record in read_records(find_sources([str(file)]))] == texts
    return texts


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(suffix, mark, end, tmp_path):
    file = tmp_path / f"A.JSONL{suffix}"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    data = mark + end.join([lines[0], "", *lines[1:], "  "]).encode()
    file.write_bytes(COMPRESS[suffix](data[:50]) + COMPRESS[suffix](data[50:]))  # several streams are one
    assert read_by_both(file) == TEXTS
    records = list(read_records(find_sources([str(file)])))
    for i, record in enumerate(records):  # and from every place
        assert list(read_records(find_sources([str(file)]), start=record.position)) == records[i + 1 :]
        assert record.position.byte <= file.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "mark"])
def test_whole_texts(suffix, mark, tmp_path, monkeypatch):
    file = tmp_path / f"a.txt{suffix}"
    text = "\r\n".join(TEXTS * 5)
    file.write_bytes(COMPRESS[suffix](mark + text.encode()))
    assert read_by_both(file) == [text]
    assert read_text(file) == text
    monkeypatch.setattr(sources, "PIECE_SIZE", 37)
    records = list(read_records(find_sources([str(file)])))
    assert len(records) > 5
    assert "".join(record.content for record in records) == text
    for i, record in enumerate(records):
        assert list(read_records(find_sources([str(file)]), start=record.position)) == records[i + 1 :]
    assert read_texts(file) == [text]


def test_any_other_file_is_a_text_to_measure(tmp_path):
    (tmp_path / "readme.md").write_text("A heron.\n")
    assert read_texts(tmp_path / "readme.md") == ["A heron.\n"]
    with pytest.raises(
        InputError, match=r"readme.md: unsupported kind of file; expected .txt, .jsonl, .json, .parquet"
    ):
        find_sources([str(tmp_path / "readme.md")])


@pytest.mark.parametrize("content", [b"", BOM])
def test_nothing_is_no_text(content, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert read_by_both(tmp_path / name) == []


def test_what_is_wrong_is_named_with_its_line(tmp_path, monkeypatch):
    long = b"a line\n" * 100
    for name, content, problem in (
        ("a.txt", b"one\ntwo\nthr\xe9e\n", "a.txt, line 3: is not UTF-8 (byte 0xe9 at position 11)"),
        ("b.txt", BOM + long + b"\xff", "b.txt, line 101: is not UTF-8 (byte 0xff at position 703)"),
        ("c.txt.gz", gzip.compress(long + b"\xff"), "c.txt.gz, line 101: is not UTF-8 (byte 0xff at position 700)"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "d.jsonl, line 2: is not UTF-8 (byte 0xff at position 10)"),
        (
            "e.jsonl",
            b'{"text": "a"}\n{"text" "b"}\n',
            "e.jsonl, line 2: not JSON (Expecting ':' delimiter at character 9)",
        ),
        ("f.txt", "Hi".encode("utf-16"), "f.txt: is UTF-16; save it as UTF-8"),
        ("g.jsonl", "{}".encode("utf-32"), "g.jsonl: is UTF-32; save it as UTF-8"),
        ("h.txt.gz", gzip.compress(long)[:-9], "h.txt.gz: cannot be read (Compressed file ended before"),
        ("i.txt.bz2", b"abc", "i.txt.bz2: cannot be read (Invalid data stream)"),
        ("j.jsonl.xz", b"abc", "j.jsonl.xz: cannot be read (Input format not supported"),
        ("k.jsonl.xz", lzma.compress(long)[:-9], "k.jsonl.xz: cannot be read (Compressed file ended before"),
        ("l.jsonl.zst", b"abcde", "l.jsonl.zst: cannot be read (ZSTD decompress failed"),
        ("m.txt.zst", zstd(long)[:-9], "m.txt.zst: cannot be read (Truncated compressed stream)"),
    ):
        (tmp_path / name).write_bytes(content)
        for size in (1 << 20, 64):
            monkeypatch.setattr(sources, "PIECE_SIZE", size)
            with pytest.raises(InputError) as error:
                list(read_records(find_sources([str(tmp_path / name)])))
            assert str(error.value).startswith(f"{tmp_path}/{problem}")
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"a.txt, line 3: is not UTF-8 \(byte 0xe9 at position 11\)"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"none.txt: cannot be read \(No such file or directory\)"):
        read_text(tmp_path / "none.txt")


def test_zstd_needs_a_package(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a.txt.zst: reading .zst needs pyarrow: pip install 'heronry\[train\]'"):
        TextFile(tmp_path / "a.txt.zst")


def test_the_beginning_of_a_text(tmp_path):
    """A character that the limit cuts is left out; one that the file itself cuts is told."""
    (tmp_path / "t.txt").write_bytes("aé鳥b".encode())
    assert [read_text(tmp_path / "t.txt", limit) for limit in (1, 2, 3, 5, 6, 7, 8, -1)] == [
        "a", "a", "aé", "aé", "aé鳥", "aé鳥b", "aé鳥b", "aé鳥b",
    ]  # fmt: skip
    (tmp_path / "cut.txt").write_bytes("aé鳥".encode()[:-1])
    for limit in (-1, 100):
        with pytest.raises(InputError, match="line 1: is not UTF-8"):
            read_text(tmp_path / "cut.txt", limit)
