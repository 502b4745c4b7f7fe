"""Several adapters over one model: each is a model of its own that shares all weights with it.

- the base is never changed: without an adapter it computes what it always did, with its native step
- a request keeps the model it has begun with, so adapters can be added and removed at any time, from any thread
- a state belongs to the base and its adapter together; any other model refuses it
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..adapters import adapted_model, read_adapter
from ..errors import InputError, show, unknown_name
from .text_model import TextModel


class Adapters(Mapping[str, TextModel]):
    """The adapters of an LLM by name, each as a `TextModel`."""

    def __init__(self, base: TextModel, base_file: Path | None = None):
        """base_file: the checkpoint of the model, see `read_adapter`."""
        self._base, self._base_file = base, base_file
        self._adapted: dict[str, TextModel] = {}
        self._lock = threading.Lock()  # held while the set changes; readers see it before or after

    def __getitem__(self, name: str) -> TextModel:
        return self._adapted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._adapted))

    def __len__(self) -> int:
        return len(self._adapted)

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self)})"

    def add(self, name: str, path: str | Path) -> TextModel:
        """Reads an adapter and keeps it beside the weights under a name, in place of one that had the name.

        Its notes (opening tokens, chat template) count for its texts; a tuned state that the base begins from does not,
        for it belongs to the base. No weights are copied.

        Args:
            path: a folder or file, see `heronry.adapters.read_adapter`.

        Raises:
            InputError: see `read_adapter`; also for a model that has an adapter beside its weights already. What was
                there stays.
        """
        if not isinstance(name, str) or not name:
            raise InputError(f"an adapter needs a name, got {show(name)}")
        base = self._base
        adapter = read_adapter(path, base.model, base_file=self._base_file)
        try:
            model = adapted_model(base.model, adapter)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        template = adapter.notes.get("chat_template", base.chat_template)
        adapted = TextModel(model, base.tokenizer, template, adapter.notes.get("opening_tokens", base.opening))
        adapted.tool_style = base.tool_style
        with self._lock:
            self._adapted = self._adapted | {name: adapted}
        return adapted

    def remove(self, name: str) -> None:
        """Forgets an adapter. Texts that are being written with it go on."""
        with self._lock:
            self.choose(name)
            self._adapted = {key: x for key, x in self._adapted.items() if key != name}

    def choose(self, name: str | None) -> TextModel:
        """The model with this adapter, without one for None; InputError for an unknown name."""
        if name is None:
            return self._base
        found = self._adapted.get(name) if isinstance(name, str) else None
        if found is None and not self._adapted:
            raise InputError(f"unknown adapter {show(name)}; there are none yet: see LLM.adapters.add")
        if found is None:
            raise unknown_name("adapter", name, self._adapted)
        return found

    def choose_each(self, names: str | Sequence[str | None] | None, count: int) -> list[TextModel]:
        """`choose` for each of `count` prompts: one name for all, or one each."""
        if names is None or isinstance(names, str):
            return [self.choose(names)] * count
        if not isinstance(names, Sequence) or len(names) != count:
            raise InputError(f"adapter must be a name or a list of {count}, got {show(names)}")
        return [self.choose(name) for name in names]
