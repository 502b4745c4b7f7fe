"""World and bytes as a tokenizer of `transformers`, and heronry's chat templates in its format."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer

from ...errors import InputError
from ...text.chat_templates import TEMPLATES
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
            options = {"eos_token": END, "bos_token": END, "unk_token": END, "pad_token": END} | options
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
        return "".join(tokens).encode("latin-1", errors="ignore").decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()  # the name in tokenizer_config.json is enough


def chat_template(name: str) -> str:
    """One of heronry's templates (raven, world, g1, g1-think, g1-fast-think, story) as `tokenizer.chat_template`."""
    if name not in TEMPLATES:
        raise InputError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    before_user, before_answer = template.turn.split("{user}")
    past_answer = before_answer.removesuffix(template.opening)
    before_system, after_system = template.system.split("{system}")
    collapse = "{%- set ns.text = ns.text.split('\\n') | select | join('\\n') %}"  # runs of newlines become one
    forged = " or ".join(f"{stop!r} in ns.text" for stop in template.stops)
    return (
        "{%- for message in messages %}"
        "{%- set ns = namespace(text=message['content'].replace('\\r\\n', '\\n').strip()) %}"
        "{%- if message['role'] == 'assistant' %}"
        f"{{%- if {forged} %}}{collapse}{{%- endif %}}"
        f"{{{{- ' ' + ns.text + {template.separator!r} }}}}"
        "{%- else %}"
        f"{collapse if template.collapse else ''}"
        f"{{%- if message['role'] == 'system' %}}{{{{- {before_system!r} + ns.text + {after_system!r} }}}}"
        f"{{%- else %}}{{{{- {before_user!r} + ns.text }}}}"
        f"{{%- if not loop.last %}}{{{{- {past_answer!r} }}}}"
        f"{{%- elif add_generation_prompt %}}{{{{- {before_answer!r} }}}}{{%- endif %}}"
        "{%- endif %}{%- endif %}{%- endfor %}"
    )
