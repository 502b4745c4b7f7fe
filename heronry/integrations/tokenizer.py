"""World and bytes as a tokenizer of `transformers`, and our chat templates as it takes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from ..errors import InputError
from ..text.chat_templates import TEMPLATES
from ..text.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer, load_tokenizer

END = "<|endoftext|>"


class RwkvTokenizer(PreTrainedTokenizer):
    """World, or bytes: the vocabularies that are no tokenizer.json. A token is its bytes, each as the character of the
    same number."""

    vocab_files_names = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocabulary: str = "world", **options: Any):
        ours: Tokenizer = load_tokenizer(vocabulary)
        if not isinstance(ours, WorldTokenizer | ByteTokenizer):
            raise InputError(f"vocabulary must be world or bytes, not {vocabulary!r}")
        self._ours = ours
        self._names = [word.decode("latin-1") for word in ours.vocabulary]
        if isinstance(ours, WorldTokenizer):
            self._names[0] = END
            options = {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": END} | options
        self._ids = {name: token for token, name in enumerate(self._names) if name}
        options.setdefault("clean_up_tokenization_spaces", False)
        options.setdefault("chat_template", chat_template("world"))
        super().__init__(vocabulary=vocabulary, **options)

    @property
    def vocab_size(self) -> int:
        return self._ours.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [self._names[token] for token in self._ours.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).encode("latin-1", errors="ignore").decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # the name says it


def chat_template(name: str) -> str:
    """One of our templates (raven, world, g1, g1-think, g1-fast-think, story) as `tokenizer.chat_template` takes it."""
    if name not in TEMPLATES:
        raise InputError(f"there is no chat template {name!r}; known are {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    asked, answered = template.turn.split("{user}")
    before_system, after_system = template.system.split("{system}")
    text = "message['content'].replace('\\r\\n', '\\n')"
    collapse = "{%- for _ in range(8) %}{% set ns.text = ns.text.replace('\\n\\n', '\\n') %}{% endfor %}"
    return (
        "{%- for message in messages %}"
        f"{{%- set ns = namespace(text={text}.strip()) %}}"
        f"{collapse if template.collapse else ''}"
        f"{{%- if message['role'] == 'system' %}}{{{{ {before_system!r} + ns.text + {after_system!r} }}}}"
        f"{{%- elif message['role'] == 'user' %}}{{{{ {asked!r} + ns.text }}}}"
        f"{{%- if add_generation_prompt or not loop.last %}}{{{{ {answered!r} }}}}{{%- endif %}}"
        f"{{%- else %}}{{{{ ' ' + ns.text + {template.separator!r} }}}}"
        "{%- endif %}{%- endfor %}"
    )
