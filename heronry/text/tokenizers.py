"""Text to token ids and back: bytes, RWKV World (world.py; in others' files: world_files.py) and any tokenizer.json of
Hugging Face.

All three share one small interface, `Tokenizer`. Ids without text (end of text, the padding rows of a model)
decode to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..catalog import BUNDLED
from ..errors import InputError, show
from .utf8 import ByteStream, encode_utf8
from .world import WorldTokenizer
from .world_files import NAMES as WORLD_NAMES
from .world_files import VOCABULARY_FILES, is_world_json, is_world_text

__all__ = [
    "ByteStream",
    "ByteTokenizer",
    "HFTokenizer",
    "Stream",
    "Tokenizer",
    "WindowStream",
    "WorldTokenizer",
    "guess_tokenizer",
    "load_tokenizer",
    "read_tokenizer_json",
    "spell",
]

WORLD_SIZES = range(65530, 65537)  # models pad the 65530 ids of World to 65536, some to fewer
BUNDLED_SIZE = 2048
PILE_SIZES = range(50277, 50305)  # 20B_tokenizer.json has 50277 ids; some models pad them to 50304
MAX_PADDING = 1023  # rows that a model may have beyond its tokenizer's ids
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>")

_ITSELF = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that byte-level BPE writes as their own letter
BYTE_LEVEL = {chr(x): x for x in _ITSELF}
BYTE_LEVEL |= {chr(256 + i): x for i, x in enumerate(sorted({*range(256)} - {*_ITSELF}))}


class Stream(Protocol):
    """Turns ids into text one by one. Joined, the pieces equal what `decode` returns for all ids at once."""

    @property
    def whole(self) -> bool:
        """Whether the text of all ids so far has been returned: False in the middle of a character."""

    def push(self, token: int) -> str:
        """The text that this id completes; "" in the middle of a character."""

    def finish(self) -> str:
        """The rest at the end: "", or U+FFFD for an incomplete character."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that mean end of text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; InputError for text with a lone surrogate."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""

    def stream(self) -> Stream:
        """A new stream, which has seen no ids yet."""


class ByteTokenizer:
    """Each byte of UTF-8 is one token: 256 ids, none for the end of text."""

    vocabulary = tuple(bytes([i]) for i in range(256))  # the bytes of each id
    vocab_size = 256
    stop_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(encode_utf8(text))

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.vocabulary[token] for token in tokens if 0 <= token < 256).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream(self.vocabulary)


class HFTokenizer:
    """Any `tokenizer.json` of Hugging Face's tokenizers, including 20B_tokenizer.json of the Pile models.

    Adds no tokens around a text. Special tokens written out in it ("<|endoftext|>") become their ids, as the library
    does it; special ids decode to nothing.
    """

    def __init__(self, path: str | Path, content: str | None = None):
        """content: of the file, if already read; `path` is then used in messages only."""
        from tokenizers import Tokenizer as Backend  # heavy, and not every model needs it

        if content is None and not Path(path).is_file():
            raise InputError(f"{path}: tokenizer file not found")
        try:
            self._backend = Backend.from_file(str(path)) if content is None else Backend.from_str(content)
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"{path}: not a valid tokenizer.json ({error})") from error
        self._backend.no_truncation()  # a file may ask for both; prompts are read in full
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.stop_ids = frozenset(vocabulary[name] for name in END_OF_TEXT if name in vocabulary)
        # what ends a text, by one of the usual names; else id 0, as RWKV has it
        self.end_of_text_id = next((vocabulary[name] for name in END_OF_TEXT if name in vocabulary), 0)
        self.end_of_text = self._backend.id_to_token(self.end_of_text_id)

    def encode(self, text: str) -> list[int]:
        encode_utf8(text)  # raises for lone surrogates
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._backend.decode(list(tokens), skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        content: str = self._backend.to_str()
        return content

    def stream(self) -> WindowStream:
        return WindowStream(self)

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; the bytes that byte-level BPE writes as letters of their own are read back."""
        piece = self._backend.id_to_token(token) or ""
        known = all(letter in BYTE_LEVEL for letter in piece)
        return bytes(map(BYTE_LEVEL.__getitem__, piece)) if known else piece.encode()


def spell(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; of a part of a character the bytes, such as \\xe4."""
    text = tokenizer.decode([token])
    return text if "\ufffd" not in text else bytes_of(tokenizer, token).decode(errors="backslashreplace")


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of one token, which need not be UTF-8."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.bytes_of(token)
    if isinstance(tokenizer, ByteTokenizer | WorldTokenizer):
        return tokenizer.vocabulary[token]
    return tokenizer.decode([token]).encode()


class WindowStream:
    """For tokenizers with decoders of their own, where the text of a token may depend on the one before.

    A window of ids is decoded with and without the new ones; the difference is the new text. It is held back while it
    ends in U+FFFD, which may be part of a character. (The library's DecodeStream does the same, but cannot return the
    rest at the end.)
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # ids whose text has been returned
        self._new: list[int] = []

    @property
    def whole(self) -> bool:
        return not self._new

    def push(self, token: int) -> str:
        self._new.append(token)
        piece = self._decode_new()
        if piece.endswith("\ufffd"):
            return ""
        # the context stays after a token without text, for the next one may still depend on it
        self._context, self._new = (self._new if piece else self._context + self._new), []
        return piece

    def finish(self) -> str:
        piece = self._decode_new()
        self._new = []
        return piece

    def _decode_new(self) -> str:
        """The text of the new ids, given the context."""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._new)[len(before) :]


def load_tokenizer(spec: str | Path | Tokenizer, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `spec` names, checked against a model's vocabulary.

    Args:
        spec: "bytes", "world" (also rwkv_vocab_v20230424), "bundled" (of the bundled model), the path of a
            tokenizer.json, of World's vocabulary as .txt or .json, or of a folder with one of them; a Tokenizer is
            returned as it is.
        vocab_size: number of rows in the model's embedding.

    Raises:
        InputError: the file is missing or not a tokenizer, or the tokenizer does not fit the model.
    """
    tokenizer: Tokenizer
    if isinstance(spec, Tokenizer):
        tokenizer = spec
    elif not isinstance(spec, str | Path) or not spec:
        raise InputError(f"tokenizer must be a name, a path or a Tokenizer, got {show(spec)}")
    elif spec == "bytes":
        tokenizer = ByteTokenizer()
    elif spec in WORLD_NAMES:
        tokenizer = WorldTokenizer()
    else:
        tokenizer = _read_tokenizer_file(_find_tokenizer_file(Path(spec)))
    if vocab_size is not None and not 0 <= vocab_size - tokenizer.vocab_size <= MAX_PADDING:
        name = spec if isinstance(spec, str | Path) else type(spec).__name__
        raise InputError(
            f"tokenizer {name} has {tokenizer.vocab_size} ids, but the model has {vocab_size}: choose the tokenizer it "
            "was trained with (tokenizer= or --tokenizer)"
        )
    return tokenizer


def plain_name(spec: str | Path) -> str | Path:
    """ "world" where `spec` is a file or folder that holds World in the form of others, the path of the file for
    "bundled", else `spec` itself."""
    if spec in WORLD_NAMES:
        return "world"
    path = _find_tokenizer_file(Path(spec))
    if spec == "bundled":
        return path
    if spec == "bytes" or not path.is_file():
        return spec
    try:
        return "world" if _is_world(path, path.read_text(encoding="utf-8-sig")) else spec
    except (OSError, ValueError):  # said when it is loaded
        return spec


def _is_world(path: Path, content: str) -> bool:
    return is_world_text(content) if path.suffix == ".txt" else is_world_json(content)


def _find_tokenizer_file(path: Path) -> Path:
    """The file of a tokenizer: itself, or the one in a folder, or the bundled model's."""
    if path == Path("bundled"):
        path = BUNDLED
    if not path.is_dir():
        return path
    names = ("tokenizer.json", *VOCABULARY_FILES)
    return next((path / name for name in names if (path / name).is_file()), path / "tokenizer.json")


def _read_tokenizer_file(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(f"{path}: tokenizer file not found")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if _is_world(path, content):
        return WorldTokenizer()
    if path.suffix == ".txt":
        raise InputError(f"{path}: not World's vocabulary, the only one that is read from a .txt file")
    return HFTokenizer(path, content)


def read_tokenizer_json(content: str, path: str | Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes: World where it is World in disguise.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        InputError: Hugging Face's library cannot read it.
    """
    return WorldTokenizer() if is_world_json(content) else HFTokenizer(path, content)


def guess_tokenizer(vocab_size: int, folder: str | Path | None = None) -> str | Path:
    """What to pass to `load_tokenizer` for a model: a file beside it, or a name that its vocabulary's size implies.

    Args:
        vocab_size: number of rows in the model's embedding.
        folder: where the model's file is.

    Raises:
        InputError: neither says which tokenizer it is; the message says what to supply.
    """
    if folder is not None:
        names = ["tokenizer.json"] + ["20B_tokenizer.json"] * (vocab_size in PILE_SIZES)
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                return plain_name(path)
    if vocab_size == ByteTokenizer.vocab_size:
        return "bytes"
    if vocab_size in WORLD_SIZES:
        return "world"
    if vocab_size in PILE_SIZES:
        raise InputError(f"models with {vocab_size} ids use 20B_tokenizer.json: supply it with tokenizer=")
    hint = " (for a copy of the bundled model: bundled)" if vocab_size == BUNDLED_SIZE else ""
    raise InputError(f"no known tokenizer has {vocab_size} ids: supply one with tokenizer={hint}")
