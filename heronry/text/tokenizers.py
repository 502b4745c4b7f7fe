"""Text to token ids and back: bytes, RWKV World, and any tokenizer.json.

All three share one small interface, `Tokenizer`. Ids that have no text of their own (end of text, the rows a
vocabulary is padded with) decode to nothing.
"""

from __future__ import annotations

import ast
import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError

WORLD_SIZES = range(65530, 65537)  # models pad the 65530 ids of World to 65536, a few to less
PILE_SIZES = range(50277, 50305)  # 20B_tokenizer.json has 50277 ids; some models pad them to 50304
MOST_PADDING = 1023  # rows that a model may have beyond its tokenizer's ids
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>")


class Stream(Protocol):
    """Turns ids into text one by one. The pieces joined are what `decode` gives for all ids at once."""

    @property
    def whole(self) -> bool:
        """Whether everything pushed has come out: False inside a character."""

    def push(self, token: int) -> str:
        """The text that this id completes; "" inside a character."""

    def finish(self) -> str:
        """What is left at the end: "", or U+FFFD for a character that was never completed."""


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that mean end of text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> Stream: ...


class ByteTokenizer:
    """One token a byte of UTF-8, 256 ids, no id for the end of text."""

    vocabulary = tuple(bytes([i]) for i in range(256))  # the bytes of each id
    vocab_size = 256
    stop_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.vocabulary[token] for token in tokens if token < 256).decode(errors="replace")

    def stream(self) -> Stream:
        return _ByteStream(self.vocabulary)


class WorldTokenizer:
    """RWKV World, rwkv_vocab_v20230424: the longest match on bytes. Id 0 is the end of text.

    The package pyrwkv-tokenizer encodes; decoding goes through the vocabulary file that it ships, because its own
    decoder cannot take ids that end inside a character.
    """

    stop_ids = frozenset({0})

    def __init__(self) -> None:
        import pyrwkv_tokenizer  # loading it reads the vocabulary: only for those who want World

        trie = pyrwkv_tokenizer.RWKVTokenizer()
        self._encode = trie.encode
        self.vocabulary = _world_vocabulary(trie.vocab_filepath)
        self.vocab_size = len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        size = self.vocab_size
        return b"".join(self.vocabulary[token] for token in tokens if token < size).decode(errors="replace")

    def stream(self) -> Stream:
        return _ByteStream(self.vocabulary)


class HFTokenizer:
    """Any `tokenizer.json` of Hugging Face's tokenizers, 20B_tokenizer.json of the Pile models included.

    Nothing is added around a text. Special tokens written out in it ("<|endoftext|>") are read as such, as the
    library does; in the output they have no text.
    """

    def __init__(self, path: str | Path, text: str | None = None):
        """text: what is in the file, where that is known; `path` then only names it."""
        from tokenizers import Tokenizer as Backend  # heavy: only for those who have such a file

        if text is None and not Path(path).is_file():
            raise InputError(f"{path}: no such tokenizer file")
        try:
            self._backend = Backend.from_file(str(path)) if text is None else Backend.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"{path}: not a tokenizer.json ({error})") from error
        self._backend.no_truncation()  # a file may ask for both; a prompt is read as it is
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.stop_ids = frozenset(vocabulary[name] for name in END_OF_TEXT if name in vocabulary)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def stream(self) -> Stream:
        return _WindowStream(self)


class _ByteStream:
    """For tokenizers whose tokens are plain bytes."""

    def __init__(self, vocabulary: Sequence[bytes]):
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def whole(self) -> bool:
        return not self._decoder.getstate()[0]

    def push(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary[token]) if token < len(self._vocabulary) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For tokenizers that decode by rules of their own, which may look at the token before.

    A window of ids is decoded with and without the new ones; the difference is new text. It waits while it ends in
    U+FFFD, which may be the half of a character. (The library's DecodeStream does the same, but it has no way to
    ask for what is left at the end.)
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._known: list[int] = []  # their text is out; kept as context of what follows
        self._new: list[int] = []

    @property
    def whole(self) -> bool:
        return not self._new

    def push(self, token: int) -> str:
        self._new.append(token)
        piece = self._piece()
        if piece.endswith("\ufffd"):
            return ""
        # after a token without text the old context stays: the next one may still depend on it
        self._known, self._new = (self._new if piece else self._known + self._new), []
        return piece

    def finish(self) -> str:
        piece = self._piece()
        self._new = []
        return piece

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._known)
        return self._tokenizer.decode(self._known + self._new)[len(before) :]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of the text is half of a surrogate pair, not a character") from error


@lru_cache(maxsize=1)
def _world_vocabulary(path: str) -> tuple[bytes, ...]:
    """Id -> bytes. A line of the file: the id, a Python literal (str or bytes), its length in bytes."""
    vocabulary: dict[int, bytes] = {0: b""}
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line:
            token, rest = line.split(" ", 1)
            literal: Any = ast.literal_eval(rest.rsplit(" ", 1)[0])
            vocabulary[int(token)] = literal.encode() if isinstance(literal, str) else literal
    return tuple(vocabulary.get(i, b"") for i in range(1 + max(vocabulary)))


def load_tokenizer(spec: str | Path | Tokenizer, vocab_size: int | None = None) -> Tokenizer:
    """ "bytes", "world", a tokenizer.json or a folder that holds one; a Tokenizer stays what it is.

    vocab_size: of the model it is for.

    Raises:
        InputError: no such file, not a tokenizer, or one with ids that the model does not have.
    """
    tokenizer: Tokenizer
    if not isinstance(spec, str | Path):
        tokenizer = spec
    elif spec == "bytes":
        tokenizer = ByteTokenizer()
    elif spec == "world":
        tokenizer = WorldTokenizer()
    else:
        path = Path(spec)
        tokenizer = HFTokenizer(path / "tokenizer.json" if path.is_dir() else path)
    if vocab_size is not None and not 0 <= vocab_size - tokenizer.vocab_size <= MOST_PADDING:
        name = spec if isinstance(spec, str | Path) else type(spec).__name__
        raise InputError(
            f"tokenizer {name} has {tokenizer.vocab_size} ids, but the model has {vocab_size}: name the one it was "
            "trained with (tokenizer= or --tokenizer)"
        )
    return tokenizer


def guess(vocab_size: int, folder: str | Path | None = None) -> str | Path:
    """What `load_tokenizer` should be given for a model of this vocabulary whose file lies in `folder`.

    Raises:
        InputError: it cannot be told; the message says what to supply.
    """
    if folder is not None:
        names = ["tokenizer.json"] + ["20B_tokenizer.json"] * (vocab_size in PILE_SIZES)
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                return path
    if vocab_size == ByteTokenizer.vocab_size:
        return "bytes"
    if vocab_size in WORLD_SIZES:
        return "world"
    if vocab_size in PILE_SIZES:
        raise InputError(f"a model of {vocab_size} tokens was made with 20B_tokenizer.json: supply it with tokenizer=")
    raise InputError(f"no tokenizer is known for a vocabulary of {vocab_size}: name it with tokenizer=")
