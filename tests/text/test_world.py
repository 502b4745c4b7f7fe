"""World's tokenizer, native and in Python, gives the ids of other implementations on texts of every kind."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heronry import build
from heronry.text import world
from heronry.text.pack_world_vocabulary import pack
from heronry.text.world import FILE, NativeEncoder, PythonEncoder, WorldTokenizer, read_file, read_vocabulary

Encode = Callable[[bytes], list[int]]

CODE = 'def f(x):\n\t\treturn {"a": x[1:-1] != 0x1F}  # <br/>\r\n\\frac{1}{2} &amp; https://a.b/?c=d%20e; i += 1;\n'
PROSE = "The heron isn't flying; it stood there, 1234 years before 56.7% of us -- \u201cwhy?\u201d Café naïve Straße. "
CJK = "鳥は木の上です。我们今天去北京，天气很好！한국어 문장입니다. 漢字かなカナ\u3000「」"
EMOJI = "🐦‍⬛👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇫🇷❤️‍🔥☃️1️⃣"
OTHERS = (
    "Привет, мир! مرحبا بالعالم שלום नमस्ते สวัสดี Γειά ሰላም ქართული \u0301\u0308\u200b\u202e\ufeff\ufffd\x00\x7f\x85\u2028"
)
RUNS = " \t\n\r=-#*_~./\\0a哈\u3000\xa0é🐦"  # the longest tokens are runs of one character


def draw_text(rng: random.Random) -> str:
    """A text of one kind or of several kinds in a row."""
    return "".join(rng.choice(KINDS)(rng) for _ in range(rng.choice((1, 1, 2, 5))))


def draw_any_plane(rng: random.Random) -> str:
    """Characters of all planes, each as likely to be low as high."""
    characters = []
    while len(characters) < rng.randrange(1, 30):
        number = rng.randrange(rng.choice((0x80, 0x800, 0x3000, 0x10000, 0x110000)))
        if not 0xD800 <= number < 0xE000:
            characters.append(chr(number))
    return "".join(characters)


def draw_runs(rng: random.Random) -> str:
    return "".join(rng.choice(RUNS) * rng.choice((1, 2, 3, 7, 31, 64, 127, 128, 129, 300)) for _ in range(3))


def draw_slice(rng: random.Random) -> str:
    text = rng.choice((CODE, PROSE, CJK, EMOJI, OTHERS))
    begin = rng.randrange(len(text))
    return text[begin : begin + rng.randrange(1, 60)]


def draw_shuffled(rng: random.Random) -> str:
    text = rng.choice((CODE, PROSE, CJK, EMOJI, OTHERS))
    return "".join(rng.choices(text, k=rng.randrange(1, 40)))


def draw_tokens(rng: random.Random) -> str:
    """Tokens of the vocabulary, some cut short: what looks like a long token and is none."""
    vocabulary = read_vocabulary()
    pieces = []
    for _ in range(rng.randrange(1, 8)):
        piece = vocabulary[rng.randrange(1, len(vocabulary))].decode(errors="ignore")
        pieces.append(piece[: rng.randrange(1, 1 + max(len(piece), 1))] if rng.random() < 0.5 else piece)
    return "".join(pieces)


def draw_whitespace(rng: random.Random) -> str:
    return "".join(rng.choices(" \t\n\r\f\v\xa0\u2003\u3000", k=rng.randrange(1, 50)))


KINDS = (draw_any_plane, draw_runs, draw_slice, draw_shuffled, draw_tokens, draw_whitespace)


@pytest.fixture(scope="module", params=["native", "python"])
def encode(request) -> Encode:
    if request.param == "python":
        return PythonEncoder(read_vocabulary())
    library = build.library(Path(world.__file__).with_suffix(".cpp"))
    if library is None:
        pytest.skip("there is no compiler")
    return NativeEncoder(library, *read_file())


@pytest.fixture(scope="module")
def peer() -> Callable[[str], list[int]]:
    package = pytest.importorskip("pyrwkv_tokenizer", reason="pyrwkv-tokenizer is the reference here")
    return package.RWKVTokenizer().encode


@pytest.fixture(scope="module")
def blinkdl():
    """The tokenizer of the vocabulary's author."""
    utils = pytest.importorskip("rwkv.utils", reason="the PyPI package rwkv is the reference here")
    return utils.PIPELINE(None, "rwkv_vocab_v20230424").tokenizer


def differing(encode: Encode, peer: Callable[[str], list[int]], texts: Iterable[str]) -> list[str]:
    """The texts that get other ids than the peer's."""
    return [text for text in texts if encode(text.encode()) != peer(text)]


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_ids_of_pyrwkv_tokenizer(encode, peer, count):
    rng = random.Random(count)
    assert differing(encode, peer, (draw_text(rng) for _ in range(count))) == []


def test_ids_of_every_prefix(encode, peer):
    for text in (CODE, PROSE, CJK, EMOJI, OTHERS, " " * 300):
        assert differing(encode, peer, (text[:end] for end in range(len(text) + 1))) == []


def test_bytes_that_end_inside_a_character(encode, blinkdl):
    """pyrwkv-tokenizer takes whole characters only."""
    rng = random.Random(1)
    data = (CJK + EMOJI + OTHERS).encode()
    pieces = [data[begin:end] for begin in range(4) for end in range(begin, 100)]
    pieces += [rng.randbytes(rng.randrange(40)) for _ in range(200)]
    assert [piece for piece in pieces if encode(piece) != blinkdl.encodeBytes(piece)] == []


def test_every_token_is_its_own_longest_match(encode):
    vocabulary = read_vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == 65530
    assert all(encode(token) == [i] for i, token in enumerate(vocabulary) if i)
    assert encode(b"") == []


def test_long_texts(encode, peer):
    """Many times what one native call returns, and runs that are one token after another."""
    rng = random.Random(2)
    text = "".join(draw_text(rng) for _ in range(500)) * 5 + " " * 500_000 + "a" * 50_000 + "哈" * 50_000
    assert encode(text.encode()) == peer(text)


def test_threads_share_a_tokenizer(encode):
    rng = random.Random(3)
    texts = ["".join(draw_text(rng) for _ in range(50)).encode() * 10 for _ in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, texts)) == [encode(text) for text in texts]


def test_without_a_compiler_python_encodes(monkeypatch):
    monkeypatch.setattr(build, "library", lambda source: None)
    world._find_encoder.cache_clear()
    try:
        assert isinstance(world._find_encoder(), PythonEncoder)
        assert WorldTokenizer().encode("Hello\n\nUser: hi") == [33155, 261, 24281, 59, 4571]
    finally:
        world._find_encoder.cache_clear()


def test_it_can_be_copied_and_pickled():
    tokenizer = WorldTokenizer()
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.encode("Hello\n\nUser: hi") == [33155, 261, 24281, 59, 4571]


def test_the_file_holds_the_published_vocabulary():
    package = pytest.importorskip("pyrwkv_tokenizer", reason="pyrwkv-tokenizer brings the vocabulary as published")
    published = (Path(package.__file__).parent / "rwkv_vocab_v20230424.txt").read_text(encoding="utf-8")
    assert zlib.decompress(pack(published)) == zlib.decompress(FILE.read_bytes())


def test_world_needs_no_torch_and_no_other_package():
    code = (
        "import sys; from heronry.text.tokenizers import load_tokenizer\n"
        "load_tokenizer('world').encode('one')\n"
        "print([name for name in ('torch', 'numpy', 'pyrwkv_tokenizer', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
