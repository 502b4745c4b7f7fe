"""A model with its tokenizer and what its texts begin with: the common base of completions and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import read_time_state
from ..errors import InputError
from ..models import Model, State
from ..progress import Progress
from ..text.template_choice import AnyTemplate
from ..text.tokenizers import Tokenizer
from .conversation import is_conversation
from .generate import prefill
from .options import Prompt


class TextModel:
    """Encodes text and reads it into a state.

    Attributes:
        model, tokenizer: a `Model` and the `Tokenizer` for its vocabulary.
        chat_template: of its conversations: a template, or what `find_template` takes, such as the name of one; None =
            what is usual for its generation.
        tool_style: how the model was shown tools, one of heronry.text.tool_styles; None = as its template shows them.
        opening: token ids read in front of every text that begins from nothing, like the end-of-text token that a model
            always saw there in training; "opening_tokens" in a folder's config.json.
        start: the state of one row that a text begins from, in front of the opening; None = the model's own.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        chat_template: str | AnyTemplate | None = None,
        opening: Sequence[int] = (),
        start: State | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.tool_style: str | None = None
        self.opening = list(opening)
        self.start = start

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; those that are packed in 8 or 4 bits apart."""
        return self.model.dtype

    def num_parameters(self) -> int:
        """Of the model; packed matrices count the weights that they stand for."""
        return self.model.num_parameters()

    def encode(self, prompt: Prompt, begins: bool) -> list[int]:
        """Token ids of a text; one that `begins` from nothing has the model's opening in front. Ids stay as they are.

        Raises:
            InputError: text that is not UTF-8, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            return (self.opening if begins else []) + self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence):
            raise InputError(f"a prompt must be a text or a list of token ids, got {prompt!r}")
        size = self.model.config.vocab_size
        for token in prompt:
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise InputError(f"a prompt must be a text or a list of token ids, got {token!r} in a list")
            if not 0 <= token < size:
                raise InputError(f"token id {token} is outside this model's vocabulary of {size}")
        return [int(token) for token in prompt]

    def decode_token(self, token: int) -> str:
        """The text of one token."""
        return self.tokenizer.decode([token])

    def state(self, text: Prompt, state: State | None = None, *, progress: Progress | None = None) -> State:
        """The state after reading a text, from nothing or continuing `state`; one row that knows its text.

        progress: called with (tokens read, tokens in all).
        """
        tokens = [self.encode(text, begins=state is None)]
        before = state.texts[0] if state is not None else ""
        after = prefill(self.model, tokens, self.start if state is None else state, progress=progress)[1]
        return after.with_texts([before + self.text_of(text)])

    def begin_from(self, path: str | Path) -> None:
        """From now on every text begins from the tuned state in a file, and with the opening it was tuned with.

        Raises:
            InputError: no such file, or not a tuned state of this model.
        """
        path = Path(path).expanduser()
        if path.is_file() and is_conversation(path):
            raise InputError(f"{path}: is a conversation, which `heronry chat --session` or Chat.load continues")
        if State.is_saved_state(path):
            raise InputError(
                f"{path}: is the state after a text, which only `heronry generate` and LLM.generate continue"
            )
        tensors, notes = read_time_state(path, self.model)
        self.start = self.model.initial_state(time_states=tensors)
        self.opening = list(notes.get("opening_tokens", self.opening))
        self.chat_template = notes.get("chat_template", self.chat_template)

    def text_of(self, prompt: Prompt) -> str:
        """The text that a prompt stands for."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
