"""Text survives the round trip, and streaming gives what decoding at once gives, wherever the cut falls."""

import pytest
from bpe import train_bpe
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from heronry.errors import InputError
from heronry.text.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    WorldTokenizer,
    guess_tokenizer,
    load_tokenizer,
    spell,
)

SAMPLE = "Once upon a time there was a rook.\n\nUser: Où est-il ? 鳥は木の上です。 🐦‍⬛ ½\n" * 3
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé鳥🐦 \n\u200d\ufffd\x00")), max_size=40)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(file, SAMPLE, size=400)
    return file


@pytest.fixture(scope="module")
def tokenizers(tokenizer_json):
    return {"bytes": ByteTokenizer(), "world": WorldTokenizer(), "hf": HFTokenizer(tokenizer_json)}


def streamed(tokenizer, tokens):
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in tokens]) + stream.finish()


@pytest.mark.parametrize("name", ["bytes", "world", "hf"])
@settings(max_examples=150)
@given(text=TEXTS)
def test_round_trip_at_once_and_streamed(tokenizers, name, text):
    assume("<|endoftext|>" not in text)  # written out it is the special token, see the next test
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == text
    assert streamed(tokenizer, tokens) == text


def test_special_tokens_written_out_are_read_as_such(tokenizers):
    hf = tokenizers["hf"]
    [end] = hf.stop_ids
    assert hf.encode("one<|endoftext|>two") == [*hf.encode("one"), end, *hf.encode("two")]
    assert hf.decode(hf.encode("one<|endoftext|>two")) == "onetwo"


@pytest.mark.parametrize("name", ["bytes", "world", "hf"])
def test_a_part_of_a_character_is_spelled_as_bytes(tokenizers, name):
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode("\U00013080")  # a hieroglyph that no vocabulary has
    assert len(tokens) > 1
    assert "".join(spell(tokenizer, token) for token in tokens) == r"\xf0\x93\x82\x80"
    assert [spell(tokenizer, token) for token in tokenizer.encode("a")] == ["a"]


@pytest.mark.parametrize("name", ["bytes", "world", "hf"])
@settings(max_examples=150)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(tokenizers, name, data):
    tokenizer = tokenizers[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", ["bytes", "world", "hf"])
def test_a_cut_at_every_byte_never_shows_half_a_character(tokenizers, name):
    tokenizer = tokenizers[name]
    text = "a½鳥🐦 z"
    if name == "world":
        tokens = [1 + byte for byte in text.encode()]  # ids 1 to 256 are the bytes
    elif name == "bytes":
        tokens = list(text.encode())
    else:  # the first ids after the special one are the byte alphabet, in the order of its letters
        letters = {letter: byte for byte, letter in _byte_letters().items()}
        ids = {letters[letter]: tokenizer._backend.token_to_id(letter) for letter in letters}
        tokens = [ids[byte] for byte in text.encode()]
    for cut in range(len(tokens) + 1):
        stream = tokenizer.stream()
        shown = "".join(stream.push(token) for token in tokens[:cut])
        complete = text.encode()[:cut].decode(errors="ignore")
        assert shown == complete
        assert stream.whole == (complete.encode() == text.encode()[:cut])
        shown += "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
        assert shown == text
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in tokens[:cut]) + stream.finish() == tokenizer.decode(tokens[:cut])


def _byte_letters() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_world_is_the_published_vocabulary(tokenizers):
    world = tokenizers["world"]
    assert world.vocab_size == 65530
    assert world.encode("Hello\n\nUser: hi") == [33155, 261, 24281, 59, 4571]
    assert world.encode("\n") == [11]
    assert world.stop_ids == {0}


def test_ids_without_a_text_decode_to_nothing(tokenizers):
    assert tokenizers["world"].decode([0, 33155, 65535]) == "Hello"
    assert tokenizers["bytes"].decode([72, 300]) == "H"
    hf = tokenizers["hf"]
    assert hf.decode([0, *hf.encode("rook"), 4000]) == "rook"
    for tokenizer in tokenizers.values():
        assert streamed(tokenizer, [65535]) == ""
    for name in ("world", "bytes"):
        assert streamed(tokenizers[name], [-1]) == tokenizers[name].decode([-1]) == ""


def test_end_of_text(tokenizers):
    assert tokenizers["bytes"].stop_ids == frozenset()
    assert tokenizers["hf"].stop_ids == {0}
    assert tokenizers["hf"].encode("a<|endoftext|>")[-1] == 0


@pytest.mark.parametrize("name", ["bytes", "world", "hf"])
def test_lone_surrogates_are_refused(tokenizers, name):
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        tokenizers[name].encode("ab\ud800")


def test_a_decoder_with_rules_of_its_own_streams_too(tmp_path):
    backend = Backend(models.WordLevel({"▁the": 0, "▁rook": 1, "s": 2, ".": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()  # drops the space in front of the first word only
    backend.save(str(tmp_path / "t.json"))
    tokenizer = HFTokenizer(tmp_path / "t.json")
    assert tokenizer.decode([0, 1, 2, 3, 0]) == "the rooks. the"
    assert streamed(tokenizer, [0, 1, 2, 3, 0]) == "the rooks. the"


def test_load_by_name_and_by_file(tokenizer_json):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    assert isinstance(load_tokenizer("world", 65536), WorldTokenizer)
    assert load_tokenizer(str(tokenizer_json)).encode("rook") == load_tokenizer(tokenizer_json.parent).encode("rook")
    mine = ByteTokenizer()
    assert load_tokenizer(mine, 256) is mine


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer_json):
    with pytest.raises(InputError, match="world has 65530 ids, but the model has 256"):
        load_tokenizer("world", 256)
    with pytest.raises(InputError, match=r"tokenizer\.json has \d+ ids"):
        load_tokenizer(tokenizer_json, 256)
    with pytest.raises(InputError, match="ByteTokenizer has 256 ids"):
        load_tokenizer(ByteTokenizer(), 255)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="tokenizer file not found"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad\.json: not a valid tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_guess_tokenizer(tmp_path, tokenizer_json):
    assert guess_tokenizer(256) == "bytes"
    assert guess_tokenizer(65530) == guess_tokenizer(65536) == "world"
    for size in (50277, 50304):
        with pytest.raises(InputError, match=r"20B_tokenizer\.json.*tokenizer="):
            guess_tokenizer(size, tmp_path)
    with pytest.raises(InputError, match="no known tokenizer has 1000 ids"):
        guess_tokenizer(1000)
    pile = tmp_path / "20B_tokenizer.json"
    pile.touch()
    assert guess_tokenizer(50277, tmp_path) == pile
    assert guess_tokenizer(65536, tmp_path) == "world"  # a Pile tokenizer may lie beside World models
    assert guess_tokenizer(400, tokenizer_json.parent) == tokenizer_json


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_bytes_that_are_not_utf_8_are_called_that(name):
    """Standard input and arguments bring them as lone surrogates."""
    text = b"ab\xffc".decode(errors="surrogateescape")
    with pytest.raises(InputError, match=r"^the text is not UTF-8: byte 0xff \(U\+DCFF\) after 2 characters$"):
        load_tokenizer(name).encode(text)
