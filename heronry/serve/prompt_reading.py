"""What a model reads before it answers: the whole conversation, or what follows a kept state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ..models import State
from ..text.chat_templates import Prompt, Template
from .models import ServedModel
from .prompts import prompt_ids


class Known(NamedTuple):
    """What was read, and perhaps written, already.

    state: of one row. n_tokens: that it has read; owed: what it has not read, up to where the next turn begins.
    """

    state: State
    n_tokens: int
    owed: str


class PromptReading:
    """
    Attributes:
        prompt: that is read, without what a kept state has read.
        state: what it continues; None = it begins a text. n_known: tokens that this has read.
        text: all up to where the model writes; ids: of what is read.
    """

    def __init__(
        self,
        model: ServedModel,
        prompt: Prompt,
        known: Known | None,
        read_rest: Callable[[], Prompt],
        begin: State | None = None,
    ):
        """
        Args:
            prompt: all of it.
            known: what it begins with, if anybody knows it.
            read_rest: the prompt that follows this.
            begin: a state that all of it follows.
        """
        self.prompt, self.state, self.n_known = prompt, begin, 0
        if known is not None:
            self._go_on(model, known, read_rest, begin)
        before = "" if self.state is None else self.state.texts[0]
        self.ids = prompt_ids(model, self.prompt, begins=self.state is None)
        self.text = before + self.prompt.text

    @property
    def n_tokens(self) -> int:
        """Of the whole prompt."""
        return self.n_known + len(self.ids)

    def _go_on(self, model: ServedModel, known: Known, read_rest: Callable[[], Prompt], begin: State | None) -> None:
        """Reads only what follows the state, if that is possible."""
        if known.state.fingerprint != model.speaker.model.fingerprint:
            return
        if isinstance(self.prompt.template, Template):
            context = known.owed + read_rest().context
        else:
            text = known.state.texts[0].removeprefix("" if begin is None else begin.texts[0])
            if not self.prompt.context.startswith(text):
                return
            context = self.prompt.context[len(text) :]
        self.prompt = self.prompt._replace(context=context)
        self.state, self.n_known = known.state, known.n_tokens


def front_of(model: ServedModel, prompt: Prompt, *parts: Any) -> str:
    """Says whether two prompts stand under the same instructions, tools and others of these parts, in the same
    template."""
    template = prompt.template.with_opening("") if isinstance(prompt.template, Template) else prompt.template.name
    tools = [tool.in_openais_form() for tool in prompt.tools.values()]
    return hashlib.sha256(json.dumps([model.name, tools, repr(template), *parts], sort_keys=True).encode()).hexdigest()
