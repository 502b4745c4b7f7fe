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

    turn: a message, in place of {user}, and the beginning of the answer; no space at the end, the answer brings it
        (none after a line break).
    turn_with_input: the same for a message with an input, what the message is about, in place of {input}. Without it an
        input is shown on the next line of the message.
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
    turn_with_input: str | None = None

    def __post_init__(self) -> None:
        if "{user}" not in self.turn:
            raise InputError(f"a template's turn must contain {{user}}, got {self.turn!r}")
        if self.turn_with_input is not None and not all(x in self.turn_with_input for x in ("{user}", "{input}")):
            raise InputError(f"turn_with_input must contain {{user}} and {{input}}, got {self.turn_with_input!r}")
        if "" in self.stops:
            raise InputError("a stop string must not be empty")

    @property
    def opening(self) -> str:
        """What an answer begins with before the model writes: the beginning of a thought, such as " <think"."""
        _, colon, opening = self.turn.split("{user}", 1)[1].rpartition(":")
        return opening if colon and opening.strip() else ""

    @property
    def space(self) -> str:
        """What is between the beginning of an answer and its text."""
        return "" if self.turn.endswith("\n") else " "

    def ask(self, message: Mapping[str, Any]) -> str:
        """A message of the user, perhaps with an "input", and the beginning of its answer."""
        texts = [message["content"].strip(), (message.get("input") or "").strip()]
        if self.turn_with_input is None or not texts[1]:
            return self.turn.replace("{user}", self.clean("\n".join(filter(None, texts))))
        user, about = map(self.clean, texts)
        return re.sub(r"\{(user|input)\}", lambda place: user if place[1] == "user" else about, self.turn_with_input)

    def begin_answer(self, text: str) -> tuple[str, str]:
        """An answer in two parts: the `opening`, or "" if the answer is without its thought, and what the model writes
        behind that."""
        text = self._one_turn(text)
        if f"{self.space}{text}".startswith(self.opening):
            return self.opening, f"{self.space}{text}"[len(self.opening) :]
        if self.opening.endswith("</think") and not text.startswith("<think"):  # it skips the thinking, and so may they
            return self.opening, f">\n{text}"
        return "", f"{self.space}{text}"

    def extend(self, text: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation after `text`, that of all messages but the last: the last one is asked."""
        return text + self.ask(messages[-1])

    def render_history(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation up to where the next message begins: a system text, if there is one, and whole
        turns (see `read_messages`). A thought is there if the answer holds it: `opening` is for new answers only."""
        text = ""
        for message in messages:
            if message["role"] == "system":
                text += self.system.replace("{system}", self.clean(message["content"]))
            elif message["role"] == "user":
                text += self.ask(message).removesuffix(self.opening)
            else:
                text += f"{self.space}{self._one_turn(message['content'])}{self.separator}"
        return text

    def _one_turn(self, answer: str) -> str:
        """An answer without white space around it, and without what would end it."""
        answer = answer.replace("\r\n", "\n").strip()
        return re.sub("\n+", "\n", answer) if any(stop in answer for stop in self.stops) else answer

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
    messages with role and content alone, those of the user also with an "input" if they have one.

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
        about = message.get("input") if role == "user" else None
        if not isinstance(about, str | None):
            raise InputError(f"messages[{i}]: input must be a text, got {show(about)}")
        checked.append({"role": role, "content": content} | ({"input": about} if about else {}))
    return checked


RAVEN = Template("Bob: {user}\n\nAlice:", stops=("\n\n",))
WORLD = Template("User: {user}\n\nAssistant:")
G1 = Template("User: {user}\n\nAssistant:", system="System: {system}\n\n")
STORY = Template("User: {user}\n\nAssistant:", collapse=False, sampling={"temperature": 0.8, "top_p": 0.85})
ALPACA = Template(
    "### Instruction: {user}\n### Response:",
    stops=("\n\n### Instruction:", "\n### Instruction:"),
    turn_with_input="### Instruction: {user}\n### Input: {input}\n### Response:",
)
BELOW = "Below is an instruction that describes a task"
COMPLETE = "Write a response that appropriately completes the request.\n\n"
RAVEN_ALPACA = Template(
    f"{BELOW}. {COMPLETE}# Instruction:\n{{user}}\n\n# Response:\n",
    stops=(f"\n\n{BELOW}", "\n\n# Instruction:"),
    turn_with_input=f"{BELOW}, paired with an input that provides further context. {COMPLETE}"
    "# Instruction:\n{user}\n\n# Input:\n{input}\n\n# Response:\n",
)
INSTRUCTION = Template(
    "Instruction: {user}\n\nResponse:",
    stops=("\n\nInstruction:",),
    turn_with_input="Instruction: {user}\n\nInput: {input}\n\nResponse:",
)
QUESTION = Template("Question: {user}\n\nAnswer:", stops=("\n\nQuestion:",))
TEMPLATES = {
    "raven": RAVEN,
    "world": WORLD,
    "g1": G1,
    "g1-think": replace(G1, turn=G1.turn + " <think"),
    "g1-fast-think": replace(G1, turn=G1.turn + " <think>\n</think"),
    "story": STORY,
    "alpaca": ALPACA,  # as in Hugging Face's blog post on RWKV
    "raven-alpaca": RAVEN_ALPACA,  # as Raven was trained on Alpaca's data
    "instruction": INSTRUCTION,  # as World was trained on such data
    "qa": QUESTION,
}
NAMED_AFTER = {  # words in the names of the files that models are published in
    "raven": "raven",
    r"g[1-9][a-z]?\d*": "g1",
    r"world\d*|g0[a-z]?\d*": "world",
}


def template_by_name(file_name: str) -> str | None:
    """The name of the template that a model was trained with, told by the name of its file or folder, as in
    rwkv7-g1a-0.1b; None if that says nothing."""
    for words, template in NAMED_AFTER.items():
        if re.search(rf"(?<![a-z0-9])({words})(?![a-z0-9])", file_name.lower()):
            return template
    return None


def usual_template(generation: str, world: bool) -> str:
    """The name of the template that models of a generation usually were trained with. world: with that vocabulary."""
    if generation == "rwkv4" and not world:
        return "raven"
    return "g1" if generation == "rwkv7" and world else "world"


def parse_template(text: str) -> Template:
    r"""A template written as one turn, such as "Bob: {user}\n\nAlice:", perhaps with a system text in front of it:
    "System: {system}\n\nBob: {user}\n\nAlice:". An answer ends where the model begins the next turn.
    """
    first = re.match(r".*\{system\}\s*", text, re.DOTALL)
    system = first[0] if first else WORLD.system
    turn = text[len(system) if first else 0 :].rstrip(" ")
    label, _, lead = turn.partition("{user}")
    separator = lead[: len(lead) - len(lead.lstrip("\n"))] or "\n\n"
    return Template(turn, system, separator, (separator + label.rstrip(),))


def template_from(fields: dict[str, Any]) -> Template:
    """Undoes what JSON does to a Template: tuples became lists, and token ids text."""
    sampling = dict(fields["sampling"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    return Template(**{**fields, "stops": tuple(fields["stops"]), "sampling": sampling})
