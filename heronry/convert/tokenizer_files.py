"""The tokenizer of a model that is converted, in the form that each target format needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text.pack_world_vocabulary import vocabulary_text
from ..text.tokenizers import ByteTokenizer, HFTokenizer, WorldTokenizer, guess_tokenizer, load_tokenizer
from ..text.world import read_vocabulary

VOCABULARY = "rwkv_vocab_v20230424.txt"


class TokenizerFiles:
    """A tokenizer as the text of a tokenizer.json, as a vocabulary, or as files of a folder.

    Args:
        source: the checkpoint.
        stored: the text of a tokenizer.json stored inside the checkpoint.
        vocab_size: of the model.
        name: the tokenizer that the caller asked for, which takes precedence.
    """

    def __init__(self, source: Path, stored: str | None, vocab_size: int, name: str | Path | None):
        self.stored = stored if name is None else None
        self.name: str | Path | None = name  # "bytes", "world", or the path of a tokenizer.json or its folder
        if name is None and self.stored is None:
            with suppress(InputError):  # unknown for the source too: it is named when the model is used
                self.name = guess_tokenizer(vocab_size, source if source.is_dir() else source.parent)
        if name is not None:
            load_tokenizer(name, vocab_size)  # InputError if it does not fit

    def json_text(self) -> str | None:
        """The text of a tokenizer.json; None if there is none."""
        if self.stored is not None or self.name in (None, "bytes", "world"):
            return self.stored
        path = Path(self.name or "")
        return (path / "tokenizer.json" if path.is_dir() else path).read_text(encoding="utf-8")

    def end_of_text(self) -> int:
        """The id of the token that ends a text: 0 in World, and wherever no tokenizer.json says otherwise."""
        text = self.json_text()
        return 0 if text is None else HFTokenizer("tokenizer.json", text).end_of_text_id

    def vocabulary(self) -> Sequence[bytes] | None:
        """The bytes of each token id; None unless it is "bytes" or "world"."""
        if self.name not in ("bytes", "world"):
            return None
        tokenizer = load_tokenizer(self.name)
        assert isinstance(tokenizer, ByteTokenizer | WorldTokenizer)
        return tokenizer.vocabulary

    def write(self, folder: Path, *, for_transformers: bool) -> None:
        """Writes tokenizer.json; for transformers also tokenizer_config.json, which names the class and the special
        tokens, and for World the vocabulary as a text, which llama.cpp's conversion script reads."""
        text = self.json_text()
        if text is not None:
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        if not for_transformers or (text is None and self.name is None):
            return
        config: dict[str, Any] = {"tokenizer_class": "RwkvTokenizer", "vocabulary": str(self.name)}
        if text is not None:
            end = HFTokenizer("tokenizer.json", text).end_of_text
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", "attention_mask"],
            }
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self.name == "world":
            (folder / VOCABULARY).write_text(vocabulary_text(read_vocabulary()), encoding="utf-8", newline="\n")
