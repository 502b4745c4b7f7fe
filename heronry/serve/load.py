"""The models that a server starts with, from what the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.llm import LLM
from ..engine.text_model import TextModel
from ..errors import InputError
from ..progress import Progress
from ..text.chat_templates import trained_context
from .models import ModelTable, ServedModel, name_of


def split_name(text: str) -> tuple[str | None, str]:
    """NAME=PATH in two; None where no name is given, and for what is a path with = in it."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        return None, text
    if not name or not path:
        raise InputError(f"{text!r}: expected NAME=PATH")
    return name, path


def served_names(models: Sequence[str], adapters: Sequence[str] = (), states: Sequence[str] = ()) -> list[str]:
    """The names that `load_models` gives; InputError for two of one name."""
    names = [_named(text)[0] for text in [*(models or ["bundled"]), *adapters, *states]]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}; name them NAME=PATH")
    return names


def _named(text: str) -> tuple[str, str]:
    """The name of NAME=PATH, or of PATH, and the path."""
    name, path = split_name(text)
    return name or name_of(path), path


def load_models(
    models: Sequence[str],
    adapters: Sequence[str] = (),
    states: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> ModelTable:
    """
    Args:
        models: PATH or NAME=PATH each; the name is that of the file otherwise.
        adapters: NAME=PATH: the first model with an adapter.
        states: NAME=PATH: the first model from a tuned state on.
        options: of `LLM`.

    Raises:
        InputError: what cannot be loaded, or two of one name.
    """
    served_names(models, adapters, states)
    served: list[ServedModel] = []

    def add(name: str, llm: LLM, speaker: TextModel, path: str) -> None:
        served.append(ServedModel(name, llm, speaker, path, trained_context(name_of(path))))

    for name, path in map(_named, models or ["bundled"]):
        llm = LLM(None if path == "bundled" else path, progress=progress, **options)
        add(name, llm, llm, path)
    llm, path = served[0].llm, served[0].path
    for name, adapter in map(_named, adapters):
        add(name, llm, llm.adapters.add(name, adapter), f"{path} + {adapter}")
    for name, state in map(_named, states):
        tuned = TextModel(llm.model, llm.tokenizer, llm.chat_template, llm.opening)
        tuned.tool_style = llm.tool_style
        tuned.begin_from(state)
        add(name, llm, tuned, f"{path} + {state}")
    return ModelTable(served)
