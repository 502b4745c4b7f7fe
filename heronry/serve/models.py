"""The models that a server has, by name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..engine.chat import choose_template
from ..engine.embeddings import embedding_model
from ..engine.llm import LLM
from ..engine.prefix_keys import CacheRoot, cache_root, model_identity
from ..engine.text_model import TextModel
from ..models import Model
from ..text.chat_templates import TEMPLATES, fill_in_middle
from ..text.template_choice import AnyTemplate, describe_template
from ..text.thinking import THINKING
from ..text.world import WorldTokenizer
from .errors import ApiError

MISDIRECTED = 421  # the status that says to the front of a cluster: another replica has this model


@dataclass(frozen=True)
class ServedModel:
    """One name that clients can ask for.

    name: its id in /v1/models.
    llm: the loaded model; speaker: what answers under this name, the LLM itself or one of its adapters or tuned states.
    path: of its file, or "bundled".
    context: tokens of the texts that it was trained on, if its name says it; no limit.
    """

    name: str
    llm: LLM
    speaker: TextModel
    path: str
    context: int | None
    created: int = field(default_factory=lambda: int(time.time()))
    roots: dict[str, CacheRoot] = field(default_factory=dict, repr=False)

    @property
    def template(self) -> AnyTemplate:
        """Of its conversations."""
        return choose_template(self.speaker, None)

    def root(self, owner: str) -> CacheRoot:
        """Where the keys of what is kept of prompts begin: that of one owner is never found by another."""
        if owner not in self.roots:
            self.roots[owner] = cache_root(self.speaker.model, self.speaker.start, salt=owner)
        return self.roots[owner]

    @cached_property
    def identity(self) -> str:
        """See `model_identity`."""
        return model_identity(self.speaker.model, self.speaker.start)

    @cached_property
    def embedding_model(self) -> Model:
        """What reads texts to embed them."""
        return embedding_model(self.speaker.model)

    def fill_in_middle(self, prefix: str, suffix: str) -> str:
        """The prompt for what comes between two texts; ApiError if the model was never shown such ones."""
        if not isinstance(self.speaker.tokenizer, WorldTokenizer):
            message = f"{self.name!r} cannot fill in the middle: its vocabulary is not that of RWKV World"
            raise ApiError(400, message, "suffix")
        return fill_in_middle(prefix, suffix)

    def describe(self) -> dict[str, Any]:
        """As in /v1/models."""
        model = self.speaker.model
        meta = {
            "n_vocab": model.config.vocab_size,
            "n_ctx_train": self.context,
            "n_embd": model.config.n_embd,
            "n_layer": model.config.n_layer,
            "n_params": self.speaker.num_parameters(),
            "generation": model.generation,
            "dtype": model.quantization or str(model.dtype).removeprefix("torch."),
            "state_bytes": model.initial_state().nbytes,
            "template": describe_template(self.template),
            "templates": [*TEMPLATES],
            "thinks": [*THINKING],
        }
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "heronry",
            "root": self.path,
            "max_model_len": self.context,
            "meta": meta,
        }


class ModelTable:
    """All models of a server; the first is the one that answers where a request names none."""

    def __init__(self, models: Sequence[ServedModel], elsewhere: Sequence[str] = ()):
        """elsewhere: names of models that other servers behind the same address have."""
        self.by_name = {model.name: model for model in models}
        self.elsewhere = elsewhere

    def add(self, model: ServedModel) -> None:
        """One more, or in place of one of its name."""
        self.by_name = self.by_name | {model.name: model}  # readers see it before or after

    def remove(self, name: str) -> None:
        self.by_name = {other: model for other, model in self.by_name.items() if other != name}

    def find(self, name: str | None) -> ServedModel:
        """ApiError for a name that is not here; if it is elsewhere, with the header x-model."""
        if not name:
            return next(iter(self.by_name.values()))
        if name in self.elsewhere:
            error = ApiError(MISDIRECTED, f"the model {name!r} is not at this replica", "model")
            error.headers["x-model"] = quote(name)
            raise error
        if name not in self.by_name:
            known = ", ".join([*self.by_name, *self.elsewhere])
            raise ApiError(404, f"there is no model {name!r} here; there is {known}", "model", "model_not_found")
        return self.by_name[name]


def name_of(path: str | Path) -> str:
    """The id of a model from its file or folder."""
    return Path(path).stem if Path(path).suffix in (".pth", ".safetensors", ".gguf") else Path(path).name
