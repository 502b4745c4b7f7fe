"""World and bytes as a tokenizer of `transformers`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from ...errors import InputError
from ...text.jinja_templates import chat_template
from ...text.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer, load_tokenizer

END = "<|endoftext|>"


class RwkvTokenizer(PreTrainedTokenizer):
    """World or bytes, the vocabularies without a tokenizer.json. A token is named by its bytes in latin-1."""

    vocab_files_names = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocabulary: str = "world", **options: Any):
        tokenizer: Tokenizer = load_tokenizer(vocabulary)
        if not isinstance(tokenizer, WorldTokenizer | ByteTokenizer):
            raise InputError(f"vocabulary must be world or bytes, not {vocabulary!r}")
        self._heronry_tokenizer = tokenizer
        self._names = [token.decode("latin-1") for token in tokenizer.vocabulary]
        if isinstance(tokenizer, WorldTokenizer):
            self._names[0] = END
            options.setdefault("unk_token", END)
        # id 0 is what config.json says of either; padding needs one, and lm-evaluation-harness all three
        options = dict.fromkeys(("eos_token", "bos_token", "pad_token"), self._names[0]) | options
        self._ids = {name: token for token, name in enumerate(self._names) if name}
        options.setdefault("clean_up_tokenization_spaces", False)
        options.setdefault("chat_template", chat_template("world"))
        super().__init__(vocabulary=vocabulary, **options)

    @property
    def vocab_size(self) -> int:
        return self._heronry_tokenizer.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self._names[token] for token in self._heronry_tokenizer.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        vocabulary = self._heronry_tokenizer.vocabulary
        # the name of an added token, or of the end of text, is its text
        known = (vocabulary[self._ids[token]] if token in self._ids else b"" for token in tokens)
        pieces = (piece or token.encode() for piece, token in zip(known, tokens, strict=True))
        return b"".join(pieces).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # the name in tokenizer_config.json is enough
