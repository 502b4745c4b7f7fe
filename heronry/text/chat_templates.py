"""How models were shown conversations in training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError

FOCUSED = {"top_p": 0.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}  # what chat models are used with


@dataclass(frozen=True)
class Template:
    """How a model was shown conversations in training.

    turn: a message, in place of {user}, and the beginning of the answer; no space at the end, the answer brings it.
    system: what a system text looks like, in front of everything.
    separator: between an answer and the next turn.
    stops: what ends an answer, besides the end of text.
    collapse: runs of newlines within a message become one, for an empty line would end the message.
    sampling: fields of heronry.Sampling for answers, where the caller says nothing else.
    """

    turn: str
    system: str = "{system}\n\n"
    separator: str = "\n\n"
    stops: tuple[str, ...] = ("\n\nUser:",)
    collapse: bool = True
    sampling: Mapping[str, Any] = field(default_factory=lambda: FOCUSED)

    def clean(self, message: str) -> str:
        """A message as the model gets to see it; InputError if nothing is left of it."""
        message = message.replace("\r\n", "\n").strip()
        if not message:
            raise InputError("the message is empty")
        return re.sub("\n+", "\n", message) if self.collapse else message


RAVEN = Template("Bob: {user}\n\nAlice:", stops=("\n\n",))
WORLD = Template("User: {user}\n\nAssistant:")
G1 = Template("User: {user}\n\nAssistant:", system="System: {system}\n\n")
STORY = Template("User: {user}\n\nAssistant:", collapse=False, sampling={"temperature": 0.8, "top_p": 0.85})
TEMPLATES = {
    "raven": RAVEN,
    "world": WORLD,
    "g1": G1,
    "g1-think": replace(G1, turn=G1.turn + " <think"),
    "g1-fast-think": replace(G1, turn=G1.turn + " <think>\n</think"),
    "story": STORY,
}


def usual_template(generation: str, world: bool) -> str:
    """The name of the template that models of a generation usually were trained with. world: with that vocabulary."""
    if generation == "rwkv4" and not world:
        return "raven"
    return "g1" if generation == "rwkv7" and world else "world"


def template_from(fields: dict[str, Any]) -> Template:
    """Undoes what JSON does to a Template: tuples became lists."""
    return Template(**{**fields, "stops": tuple(fields["stops"])})
