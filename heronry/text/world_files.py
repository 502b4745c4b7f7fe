"""RWKV World in the files of others: a tokenizer.json of Hugging Face's, or the vocabulary itself as .txt or .json.

- a file is World if its whole vocabulary is: 65,529 tokens under the same ids, whatever it is called, and besides them
  at most placeholders, which no text has. One that was given more tokens is another tokenizer
- a tokenizer.json spells bytes in the alphabet of GPT-2. Its model is WordPiece without a prefix, WordLevel behind a
  regular expression that finds the longest token, or rwkv-rs' RwkvTrie; all of them give World's ids
- WordPiece of Hugging Face's library tries every end of a token, which takes time that grows with the cube of a piece's
  length. The tokenizer.json written here cuts a text first, where no token of World reaches across
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from .pack_world_vocabulary import vocabulary_text
from .world import COUNT, FILE, read_vocabulary

NAMES = ("world", FILE.stem)  # of this vocabulary
VOCABULARY_FILES = (f"{FILE.stem}.txt", f"{FILE.stem}.json")
END = "<|endoftext|>"  # the name of id 0 there
MODELS = ("WordPiece", "WordLevel", "RwkvTrie")
PLACEHOLDER = "\ue000"  # what the names of ids without a token begin with
PADDED_SIZE = 65536  # ids in files of others: World's and placeholders
# where a text may be cut: in front of a space, unless white space precedes; behind a word; in front of a word that
# follows no sign which tokens begin with
CUTS = r"(?<=[^\t\n ])(?= )|(?<=\p{L})(?=[^\p{L}\p{M}])|(?<=[^\p{L}\p{M}\s'°´’“—-])(?=\p{L})"


def is_world_json(content: str) -> bool:
    """Whether the text of a .json file, a tokenizer.json or a vocabulary, is World."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(parsed, dict):
        return False
    model = parsed.get("model")
    if not isinstance(model, dict):
        more = [value for name, value in parsed.items() if not (name.isdecimal() and int(name) <= COUNT)]
        return all(map(_is_placeholder, more)) and all(
            _as_bytes(parsed.get(str(i))) == token for i, token in enumerate(read_vocabulary()) if i
        )
    kind, vocabulary = model.get("type"), model.get("vocab")
    if kind not in MODELS or parsed.get("normalizer") or not isinstance(vocabulary, dict):
        return False
    if kind == "WordPiece" and model.get("continuing_subword_prefix") != "":
        return False
    cuts = json.dumps(parsed.get("pre_tokenizer"))
    if kind != "RwkvTrie" and ('"add_prefix_space": true' in cuts or '"use_regex": true' in cuts):
        return False
    added = parsed.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(x, dict) for x in added):
        return False
    more = [*(x.get("content") for x in added if x.get("id") != 0), *(vocabulary.keys() - _spelled().keys())]
    return all(token == END or _is_placeholder(token) for token in more) and all(
        vocabulary.get(token) == i for token, i in _spelled().items()
    )


def _is_placeholder(token: Any) -> bool:
    """Whether this is the name of an id that no text has."""
    return isinstance(token, str) and token.startswith(PLACEHOLDER)


def is_world_text(content: str) -> bool:
    """Whether the text of a .txt file is the vocabulary of World as its author publishes it."""
    return content.splitlines() == vocabulary_text(read_vocabulary()).splitlines()


def _as_bytes(value: Any) -> bytes | None:
    """The bytes of a token in a .json: a text, or a list of bytes where they are no text."""
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    if isinstance(value, list) and all(type(x) is int and 0 <= x < 256 for x in value):
        return bytes(value)
    return None


def world_json() -> dict[str, Any]:
    """World as the content of a tokenizer.json that Hugging Face's library reads, with World's ids for every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    placeholders = {f"{PLACEHOLDER}{i}\ue001": i for i in range(COUNT + 1, PADDED_SIZE)}
    vocabulary = {END: 0, **_spelled(), **placeholders}
    longest = 2**31 - 1  # a longer piece would be unknown
    model = models.WordPiece(
        vocab=vocabulary, unk_token=END, continuing_subword_prefix="", max_input_chars_per_word=longest
    )
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(CUTS), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


@cache
def _spelled() -> Mapping[str, int]:
    """The tokens of World, from id 1 on, with a letter for each byte as in GPT-2's files."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    letters = {byte: byte if byte in printable else next(others) for byte in range(256)}
    tokens = enumerate(read_vocabulary())
    return {token.decode("latin-1").translate(letters): i for i, token in tokens if i}
