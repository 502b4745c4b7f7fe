"""The tokenizer of a model that is converted, in the form that each target format needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text.pack_world_vocabulary import vocabulary_text
from ..text.tokenizers import ByteTokenizer, HFTokenizer, WorldTokenizer, guess_tokenizer, load_tokenizer, plain_name
from ..text.world import read_vocabulary
from ..text.world_files import END, VOCABULARY_FILES, is_world_json, world_json


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
        # "bytes", "world", or the path of a tokenizer.json or its folder
        self.name: str | Path | None = None if name is None else plain_name(name)
        if self.stored is not None and is_world_json(self.stored):
            self.stored, self.name = None, "world"
        elif name is None and self.stored is None:
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

    def write(self, folder: Path) -> None:
        """Writes tokenizer.json, unless the tokenizer needs no file."""
        text = self.json_text()
        if text is not None:
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")

    def write_for_transformers(self, folder: Path, template: str | None) -> None:
        """Writes what transformers reads without this package: tokenizer.json, tokenizer_config.json with the special
        tokens, chat_template.jinja. For World also the vocabulary as a text, for llama.cpp's conversion script.

        template: the chat template in Jinja; None = unknown.
        """
        text = self.json_text()
        if text is None and self.name is None:
            return
        config: dict[str, Any] = {"tokenizer_class": "RwkvTokenizer", "vocabulary": str(self.name)}
        if text is not None or self.name == "world":
            end = END if text is None else HFTokenizer("tokenizer.json", text).end_of_text
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            config |= {"model_input_names": ["input_ids", "attention_mask"]}
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
        if self.name == "world":
            text = json.dumps(world_json(), ensure_ascii=False)
            # END written out in a text is text, as RWKV has it
            config |= {"unk_token": END, "padding_side": "left", "split_special_tokens": True}
            vocabulary = vocabulary_text(read_vocabulary())
            (folder / VOCABULARY_FILES[0]).write_text(vocabulary, encoding="utf-8", newline="\n")
        if text is not None:
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")
