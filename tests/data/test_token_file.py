"""Token files: against a reader and a writer made from the description of the format alone."""

from __future__ import annotations

import json
import struct
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heronry import InputError
from heronry.data import token_file
from heronry.data.token_file import TokenFile, TokenWriter

CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
DOCUMENTS = st.lists(st.lists(st.integers(0, 127), max_size=9), min_size=1, max_size=12).filter(any)


def read_pair(prefix: Path) -> list[list[int]]:
    """The documents of a pair, found by its byte pointers."""
    index, data = (prefix.with_name(prefix.name + ending).read_bytes() for ending in (".idx", ".bin"))
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    dtype = np.dtype(CODES[code])
    sizes = np.frombuffer(index, np.int32, sequences, 34)
    pointers = np.frombuffer(index, np.int64, sequences, 34 + 4 * sequences)
    first = np.frombuffer(index, np.int64, documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents
    assert len(data) == sizes.sum() * dtype.itemsize
    found = [np.frombuffer(data, dtype, n, at).tolist() for n, at in zip(sizes, pointers, strict=True)]
    return [[*chain(*found[a:b])] for a, b in pairwise(first)]


def write_pair(prefix: Path, documents: list[list[list[int]]], code: int) -> None:
    """documents: of sequences of ids."""
    dtype = np.dtype(CODES[code])
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    first = np.cumsum([0] + [len(document) for document in documents], dtype=np.int64)
    pointers = np.cumsum([0, *sizes[:-1]], dtype=np.int64) * dtype.itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(first))
    prefix.with_name(prefix.name + ".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + first.tobytes())
    prefix.with_name(prefix.name + ".bin").write_bytes(np.array([*chain(*sequences)], dtype).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@settings(max_examples=50)
@given(DOCUMENTS, st.sampled_from(["uint16", "int32"]))
def test_what_is_written_another_reads(folder, documents, dtype):
    writer = TokenWriter(folder / "a.b", dtype)  # a dot in the name is no ending
    for document in documents:
        writer.write(np.array(document[:3], np.int64), ends=False)
        writer.write(np.array(document[3:], np.int64))
    writer.finish({})
    assert read_pair(folder / "a.b") == documents
    file = TokenFile(folder / "a.b")
    assert [file.document(d).tolist() for d in range(len(file))] == documents
    assert file.mask is None
    assert not list(folder.glob("*.part"))


@settings(max_examples=50)
@given(st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=3), min_size=1).filter(str), st.data())
def test_what_another_wrote_is_read(folder, documents, data):
    documents.append([[1], [2, 3]])
    write_pair(folder / "pair", documents, data.draw(st.sampled_from(list(CODES))))
    whole = [[*chain(*document)] for document in documents]
    for name in ("pair", "pair.bin", "pair.idx"):
        file = TokenFile(folder / name)
        assert [file.document(d).tolist() for d in range(len(file))] == whole
    assert file.tokens.tolist() == [*chain(*whole)]
    assert (file.vocab_size, file.end_of_text, file.tokenizer) == (max(map(max, filter(None, whole))) + 1, 0, None)


def test_long_documents_are_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "MAX_SEQUENCE", 4)
    monkeypatch.setattr(token_file, "BLOCK", 2)
    documents = [list(range(n)) for n in (3, 4, 5, 0, 13, 1)]
    writer = TokenWriter(tmp_path / "x", "uint16")
    for document in documents:
        writer.write(np.array(document, np.uint16))
    writer.finish({})
    assert read_pair(tmp_path / "x") == documents
    assert struct.unpack_from("<Q", (tmp_path / "x.idx").read_bytes(), 18) == (1 + 1 + 2 + 1 + 4 + 1,)
    file = TokenFile(tmp_path / "x")
    assert [file.document(d).tolist() for d in range(len(file))] == documents


def test_the_mask_begins_where_something_is_masked(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "BLOCK", 2)
    writer = TokenWriter(tmp_path / "x", "uint16")
    writer.write(np.arange(5), np.ones(5, bool))
    writer.write(np.arange(3), np.array([True, False, True]))
    writer.write(np.arange(2))
    (tmp_path / "x.tokenizer.json").write_text("{}")
    writer.finish({"vocab_size": 7, "tokenizer": "x.tokenizer.json", "template": "g1", "end_of_text": 3})
    file = TokenFile(tmp_path / "x")
    assert file.mask.tolist() == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert (file.vocab_size, file.end_of_text) == (7, 3)
    assert file.tokenizer == file.tokenizer_file == tmp_path / "x.tokenizer.json"
    assert file.notes == {"opening_tokens": [3], "chat_template": "g1"}
    writer = TokenWriter(tmp_path / "x", "uint16")  # written anew, with nothing masked: no mask of old stays
    writer.write(np.arange(10))
    writer.finish({})
    assert TokenFile(tmp_path / "x").mask is None


def test_a_writer_goes_on_where_it_was_certain(tmp_path):
    random = np.random.default_rng(0)
    parts = [
        (random.integers(0, 9, n), random.random(n) < 0.8 if i > 3 else None, i % 3 > 0) for i, n in enumerate([7] * 12)
    ]

    def write(prefix: Path, stops: tuple[int, ...]) -> None:
        writer = TokenWriter(prefix, "uint16")
        for i, (ids, mask, ends) in enumerate(parts):
            if i in stops:
                written = writer.flush()
                writer.write(np.array([1, 2, 3]), np.array([True, False, True]))  # lost
                writer.close()
                writer = TokenWriter(prefix, "uint16", written)
            writer.write(ids, mask, ends)
        writer.finish({})

    write(tmp_path / "once", ())
    write(tmp_path / "often", (1, 4, 5, 11))
    for ending in (".bin", ".idx", ".mask", ".json"):
        assert (tmp_path / f"once{ending}").read_bytes() == (tmp_path / f"often{ending}").read_bytes()


def test_names_appear_at_the_end_and_publishing_can_be_repeated(tmp_path):
    prefix = tmp_path / "x"
    TokenWriter(prefix, "uint16").close()
    writer = TokenWriter(prefix, "uint16")
    writer.write(np.arange(4), np.array([1, 0, 1, 1]))
    writer.seal({})
    assert all(path.suffix == ".part" for path in tmp_path.iterdir())
    (tmp_path / "x.bin.part").rename(tmp_path / "x.bin")  # a kill in the middle of it
    (tmp_path / "x.mask.part").rename(tmp_path / "x.mask")
    for _ in range(2):
        token_file.publish_parts(prefix, masked=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json", "x.mask"]
        assert TokenFile(prefix).mask.tolist() == [1, 0, 1, 1]


def test_what_it_was_made_of_may_have_any_name(tmp_path):
    """Such as a file whose name is not UTF-8."""
    writer = TokenWriter(tmp_path / "x", "uint16")
    writer.write(np.array([5, 6, 0]))
    writer.finish({"sources": ["d\udcff.jsonl", "书.jsonl"]})
    assert json.loads((tmp_path / "x.json").read_text("ascii"))["sources"] == ["d\udcff.jsonl", "书.jsonl"]


def test_a_name_may_have_its_ending(tmp_path):
    for name in ("x.bin", "x.idx", "x"):
        writer = TokenWriter(tmp_path / name, "uint16")
        writer.write(np.arange(4))
        writer.finish({})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_only_a_tokenizer_beside_it_is_taken(tmp_path):
    """It is copied into the folder of a model, which may be published."""
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "tokens"
    for name, problem in (
        ("../secret.json", "tokenizer must be bytes, world or the name of a file beside it, got '../secret.json'"),
        (str(tmp_path / "secret.json"), "or the name of a file beside it"),
        ("..\\secret.json", "or the name of a file beside it"),
        ("..", "or the name of a file beside it"),
        ("", "or the name of a file beside it"),
        ("none.json", "x.json: its tokenizer none.json is not beside it"),
    ):
        writer = TokenWriter(folder / "x", "uint16")
        writer.write(np.arange(4))
        writer.finish({"tokenizer": name})
        with pytest.raises(InputError) as error:
            TokenFile(folder / "x")
        assert problem in str(error.value)


def test_damaged_files_are_named_in_one_line(tmp_path):
    prefix = tmp_path / "x"
    writer = TokenWriter(prefix, "uint16")
    writer.write(np.arange(4), np.array([1, 0, 1, 1]))
    writer.write(np.arange(6))
    writer.finish({"vocab_size": 10})
    whole = {ending: (tmp_path / f"x{ending}").read_bytes() for ending in (".bin", ".idx", ".mask", ".json")}
    index, metadata = whole[".idx"], json.loads(whole[".json"])

    def changed(at: int, value: bytes) -> bytes:
        return index[:at] + value + index[at + len(value) :]

    cases = [
        (".bin", None, "x.bin: no such file, although x.idx exists"),
        (".idx", None, "x.idx: no such file, although x.bin exists"),
        (".bin", whole[".bin"][:-1], "x.bin: truncated: 19 bytes, expected 20 from x.idx"),
        (".bin", whole[".bin"] + b"00", "x.bin: too long"),
        (".idx", b"", "x.idx: not an index of a token file"),
        (".idx", changed(0, b"NOMIDIDX"), "x.idx: not an index of a token file"),
        (".idx", index[:20], "x.idx: truncated"),
        (".idx", index[:-3], "x.idx: truncated for 2 sequences"),
        (".idx", index + b"0", "x.idx: too long for 2 sequences"),
        (".idx", changed(9, b"\x02"), "unsupported version 2"),
        (".idx", changed(17, b"\x06"), "ids of type 6"),
        (".idx", changed(18, b"\xff" * 8), "x.idx: truncated"),
        (".idx", changed(34, struct.pack("<i", -4)), "its sequences are not consecutive"),
        (".idx", changed(50, struct.pack("<q", 9)), "its sequences are not consecutive"),
        (".idx", changed(len(index) - 8, struct.pack("<q", 3)), "its documents do not consist of its sequences"),
        (".mask", whole[".mask"][:-1], "x.mask: 9 bytes, expected 10"),
        (".json", b"{", "x.json cannot be read"),
        (".json", b"[]", "x.json is not a JSON object"),
        (".json", json.dumps(metadata | {"tokens": 11}).encode(), "says 11 tokens, but the token file has 10"),
        (".json", json.dumps(metadata | {"documents": 1}).encode(), "says 1 documents, but the token file has 2"),
        (
            ".json",
            json.dumps(metadata | {"vocab_size": "ten"}).encode(),
            "vocab_size must be a whole number of at least 1, got 'ten'",
        ),
        (".json", json.dumps(metadata | {"tokenizer": 3}).encode(), "tokenizer must be a string, got 3"),
    ]
    for ending, content, said in cases:
        path = tmp_path / f"x{ending}"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError) as error:
            TokenFile(prefix)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
        path.write_bytes(whole[ending])
    assert TokenFile(prefix).vocab_size == 10
    with pytest.raises(InputError, match=r"nothing.bin: no such file; `heronry data` makes token files of texts$"):
        TokenFile(tmp_path / "nothing")
    (tmp_path / "my.txt").write_text("A rook.")
    with pytest.raises(
        InputError, match=r"my.txt: is not a token file; `heronry data \S+my.txt -o my-tokens` makes one"
    ):
        TokenFile(tmp_path / "my.txt")
    for folder in (".", "..", "/"):
        with pytest.raises(InputError, match="is a folder; give the name of a token file"):
            TokenFile(folder)
    write_pair(tmp_path / "empty", [[[]]], 8)
    with pytest.raises(InputError, match="contains no tokens"):
        TokenFile(tmp_path / "empty")
