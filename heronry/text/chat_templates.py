"""How models were shown conversations in training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError, show

ROLES = ("system", "user", "assistant")
# what chat models are used with, in the PyPI package rwkv
FOCUSED = {"top_p": 0.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "penalize_digits": False}


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

    def __post_init__(self) -> None:
        if "{user}" not in self.turn:
            raise InputError(f"a template's turn must contain {{user}}, got {self.turn!r}")
        if "" in self.stops:
            raise InputError("a stop string must not be empty")

    @property
    def opening(self) -> str:
        """What an answer begins with before the model writes: the beginning of a thought, such as " <think"."""
        _, colon, opening = self.turn.split("{user}", 1)[1].rpartition(":")
        return opening if colon else ""

    def render_history(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation up to where the next message begins: a system text, if there is one, and whole
        turns (see `read_messages`). A thought is there if the answer holds it: `opening` is for new answers only."""
        text = ""
        question, lead = self.turn.removesuffix(self.opening).split("{user}", 1)
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                text += self.system.replace("{system}", self.clean(content))
            elif message["role"] == "user":
                text += question + self.clean(content) + lead
            else:
                answer = content.replace("\r\n", "\n").strip()
                if any(stop in answer for stop in self.stops):  # it would end there
                    answer = re.sub("\n+", "\n", answer)
                text += f" {answer}{self.separator}"
        return text

    def clean(self, message: str) -> str:
        """A message as the model gets to see it; InputError if nothing is left of it."""
        if not isinstance(message, str):
            raise InputError(f"a message must be a text, got {show(message)}")
        message = message.replace("\r\n", "\n").strip()
        if not message:
            raise InputError("the message is empty")
        return re.sub("\n+", "\n", message) if self.collapse else message


def read_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Checks a conversation: at most one message of "system" first, then "user" and "assistant" in turn. Returns the
    messages with role and content alone.

    Raises:
        InputError: another order, another role, or a content that is not text; the message is named.
    """
    checked: list[dict[str, str]] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{i}] must be a dict with role and content, got {show(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"messages[{i}]: role must be one of {', '.join(ROLES)}, got {show(role)}")
        if not isinstance(content, str):
            raise InputError(f"messages[{i}]: content must be a text, got {show(content)}")
        if role != "assistant" and not content.strip():
            raise InputError(f"messages[{i}]: the message is empty")
        last = checked[-1]["role"] if checked else None
        if role == "assistant" and last is None:
            raise InputError(f"messages[{i}]: a conversation begins with 'system' or 'user', got {role!r}")
        if last is not None and role != ("assistant" if last == "user" else "user"):
            raise InputError(f"messages[{i}]: a message of {role!r} cannot follow one of {last!r}")
        checked.append({"role": role, "content": content})
    return checked


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
    """Undoes what JSON does to a Template: tuples became lists, and token ids text."""
    sampling = dict(fields["sampling"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    return Template(**{**fields, "stops": tuple(fields["stops"]), "sampling": sampling})
