"""RWKV World in the files of others, and as a tokenizer.json that Hugging Face's library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from heronry.errors import InputError
from heronry.text.pack_world_vocabulary import vocabulary_text
from heronry.text.tokenizers import HFTokenizer, WorldTokenizer, guess_tokenizer, load_tokenizer, plain_name
from heronry.text.world import read_vocabulary
from heronry.text.world_files import is_world_json, world_json

WORLD = WorldTokenizer()
WORDS = [word for token in read_vocabulary() if token and "\ufffd" not in (word := token.decode(errors="replace"))]
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.characters(codec="utf-8")), max_size=30).map("".join)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Backend:
    file = tmp_path_factory.mktemp("world") / "tokenizer.json"
    file.write_text(json.dumps(world_json()), encoding="utf-8")
    return Backend.from_file(str(file))


@settings(max_examples=200)
@given(text=TEXTS)
def test_stock_tokenizers_give_the_same_ids(stock, text):
    assume("<|endoftext|>" not in text)  # which they take for the special token
    ids = stock.encode(text).ids
    assert ids == WORLD.encode(text)
    assert stock.decode(ids) == text


def test_no_token_is_cut(stock):
    for word in WORDS:
        assert len(stock.pre_tokenizer.pre_tokenize_str(word)) == 1, word


def test_a_long_text_takes_no_longer_a_word(stock):
    """The cuts leave short pieces; without them 16,000 characters are one piece, which takes 44 s."""
    text = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    pieces = stock.pre_tokenizer.pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in pieces) < 120
    assert stock.encode(text).ids == WORLD.encode(text)


def forms() -> dict[str, tuple[str, str]]:
    """File name and content of every form, as their authors write them."""
    content = world_json()
    vocabulary = content["model"]["vocab"]
    alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    word_level = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"}
    trie = {"type": "RwkvTrie", "vocab": {token: i for token, i in vocabulary.items() if i < 65530}}
    by_id = {}
    for i, token in enumerate(read_vocabulary()):
        try:
            by_id[str(i)] = token.decode()
        except UnicodeDecodeError:
            by_id[str(i)] = list(token)
    del by_id["0"]
    return {
        "official": ("tokenizer.json", json.dumps(content | {"pre_tokenizer": alone})),
        "ours": ("tokenizer.json", json.dumps(content, ensure_ascii=False)),
        "WordLevel": ("tokenizer.json", json.dumps(content | {"model": word_level})),
        "RwkvTrie": ("tokenizer.json", json.dumps(content | {"model": trie})),
        "txt": ("rwkv_vocab_v20230424.txt", vocabulary_text(read_vocabulary())),
        "json": ("rwkv_vocab_v20230424.json", json.dumps(by_id)),
    }


@pytest.mark.parametrize("form", ["official", "ours", "WordLevel", "RwkvTrie", "txt", "json"])
@pytest.mark.quick_for("official", "RwkvTrie", "txt")
def test_every_form_is_world(form, tmp_path):
    name, content = forms()[form]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="\n")
    for spec in (tmp_path, tmp_path / name, str(tmp_path / name)):
        assert isinstance(load_tokenizer(spec, 65536), WorldTokenizer)
        assert plain_name(spec) == "world"
    assert guess_tokenizer(65536, tmp_path) == "world"


def test_its_own_name():
    assert isinstance(load_tokenizer("rwkv_vocab_v20230424"), WorldTokenizer)
    assert plain_name("rwkv_vocab_v20230424") == "world"
    assert plain_name("bytes") == "bytes"


def test_another_vocabulary_is_not_world(tmp_path):
    """One id differs: it is read as what it is."""
    content = world_json()
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(file)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.encode(" the") == WORLD.encode(" and")
    assert plain_name(file) == file
    other = tmp_path / "other.txt"
    other.write_text(vocabulary_text(read_vocabulary()[:-1]))
    with pytest.raises(InputError, match=r"other\.txt: not World's vocabulary"):
        load_tokenizer(other)


SPECIAL = {"id": 65530, "content": "<|user|>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


def test_world_with_more_tokens_is_not_world(tmp_path):
    """As models are given tokens for roles: each is one id, wherever it is listed."""
    content = world_json()
    vocabulary = content["model"]["vocab"]
    del vocabulary["\ue00065530\ue001"]
    assert is_world_json(json.dumps(content))
    vocabulary["<|user|>"] = 65530
    assert not is_world_json(json.dumps(content))
    content["added_tokens"].append(SPECIAL)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    assert load_tokenizer(file, 65536).encode("<|user|>x") == [65530, *WORLD.encode("x")]
    assert guess_tokenizer(65536, tmp_path) == file
    del vocabulary["<|user|>"]
    assert not is_world_json(json.dumps(content))
    assert not is_world_json(json.dumps(content | {"added_tokens": 3}))
    by_id = json.loads(forms()["json"][1])
    assert is_world_json(json.dumps(by_id))
    assert not is_world_json(json.dumps(by_id | {"65530": "<|user|>"}))


@pytest.mark.parametrize("option", ["add_prefix_space", "use_regex"])
def test_world_behind_other_cuts_is_not_world(option):
    alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    assert is_world_json(json.dumps(world_json() | {"pre_tokenizer": alone}))
    assert not is_world_json(json.dumps(world_json() | {"pre_tokenizer": alone | {option: True}}))


def test_world_with_a_byte_order_mark(tmp_path):
    vocabulary = tmp_path / "rwkv_vocab_v20230424.txt"
    vocabulary.write_text("\ufeff" + vocabulary_text(read_vocabulary()), encoding="utf-8", newline="\n")
    assert isinstance(load_tokenizer(vocabulary), WorldTokenizer)
