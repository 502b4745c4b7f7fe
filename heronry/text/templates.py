"""How models were shown conversations in training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError, show

# what chat models are used with, in the PyPI package rwkv
FOCUSED = {"top_p": 0.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "penalize_digits": False}


@dataclass(frozen=True)
class Template:
    """How a model was shown conversations in training.

    turn: a message, in place of {user}, and the beginning of the answer; no space at the end, the answer brings it
        (none after a line break or a ✿).
    turn_with_input: the same for a message with an input, what the message is about, in place of {input}. Without it an
        input is shown on the next line of the message.
    system: what a system text looks like.
    separator: between an answer and the next turn.
    stops: what ends an answer, besides the end of text.
    collapse: runs of newlines within a message become one, for an empty line would end the message.
    sampling: fields of heronry.Sampling for answers, where the caller says nothing else.
    tool: what the result of a tool looks like, in place of {tool}; None = a message of the user.
    tool_style: how tools are shown, one of heronry.text.tool_styles; None = models with this template know none.
    """

    turn: str
    system: str = "{system}\n\n"
    separator: str = "\n\n"
    stops: tuple[str, ...] = ("\n\nUser:", "\n\nSystem:", "\n\nAssistant:")
    collapse: bool = True
    sampling: Mapping[str, Any] = field(default_factory=lambda: FOCUSED)
    turn_with_input: str | None = None
    tool: str | None = None
    tool_style: str | None = "json"

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
        end = self.turn.split("{user}", 1)[1]
        if thought := re.search(" ?<think.*", end, re.DOTALL):
            return thought[0]
        _, colon, opening = end.rpartition(":")
        return opening if colon and opening.strip() else ""

    @property
    def space(self) -> str:
        """What is between the beginning of an answer and its text."""
        return "" if self.turn.removesuffix(self.opening).endswith(("\n", "✿")) else " "

    def with_opening(self, opening: str) -> Template:
        """The same template with another opening; the space in front of it is this template's."""
        opening = self.space + opening.lstrip(" ") if opening else ""
        return replace(self, turn=self.turn.removesuffix(self.opening) + opening)

    def with_names(self, user: str = "", assistant: str = "", system: str = "") -> Template:
        """The same with others who speak, where their names stand in front of a colon; "" = as it is.

        Raises:
            InputError: this template does not name them so.
        """
        names = [self.turn.partition(":")[0], self.label.strip().removesuffix(":"), self.system.partition(":")[0]]
        changed: dict[str, str] = {}
        for old, new in zip(names, (user, assistant, system), strict=True):
            if new and not re.fullmatch(r"\w+", old):
                raise InputError(f"this template does not name who speaks; {new!r} has no place in it")
            changed |= {old: new} if new else {}

        def rename(text: str) -> str:
            return re.sub(r"^(\w+)(?=:)", lambda found: changed.get(found[0], found[0]), text, flags=re.MULTILINE)

        stops = tuple(map(rename, self.stops))
        return replace(self, turn=rename(self.turn), system=rename(self.system), stops=stops)

    def ask(self, message: Mapping[str, Any]) -> str:
        """A message of the user, perhaps with an "input", and the beginning of its answer."""
        question, lead = self._question(message)
        return question + lead + self.opening

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
        """The text of messages of system, user (perhaps with an "input"), assistant and tool in any order, up to where
        the next one begins. A thought is there if the answer holds it: `opening` is for new answers only."""
        text = ""
        lead = ""  # between the last question and its answer
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "assistant":
                said = self._one_turn(content)
                text += (lead or self.label) + (self.space if said else "") + said + self.separator
                lead = ""
                continue
            text += self._break(lead)
            lead = ""
            if role == "system":
                text += self.system.replace("{system}", self.clean(content))
            elif role == "tool" and self.tool is not None:
                text += self.tool.replace("{tool}", self.clean(content))
            else:
                question, lead = self._question(message)
                text += question
        return text + self._break(lead)

    def _break(self, lead: str) -> str:
        """What ends a question that has no answer."""
        return (lead.removesuffix(self.label) or self.separator) if lead else ""

    def render_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """As `render_history`, up to where the text of an answer begins, without the `opening`."""
        return self.render_history([*messages, {"role": "assistant", "content": ""}]).removesuffix(self.separator)

    @property
    def label(self) -> str:
        """The line that an answer begins with, up to its text."""
        label = re.search(r"[^\n]*\n?\Z", self.turn.split("{user}", 1)[1].removesuffix(self.opening))
        return label[0] if label else ""

    def _question(self, message: Mapping[str, Any]) -> tuple[str, str]:
        """A message of the user, and what comes between it and its answer."""
        texts = [message["content"].strip(), (message.get("input") or "").strip()]
        if self.turn_with_input is None or not texts[1]:
            before, lead = self.turn.removesuffix(self.opening).split("{user}", 1)
            return before + self.clean("\n".join(filter(None, texts))), lead
        user, about = map(self.clean, texts)
        *_, last = re.finditer(r"\{(user|input)\}", self.turn_with_input)
        form, lead = self.turn_with_input[: last.end()], self.turn_with_input[last.end() :]
        return re.sub(r"\{(user|input)\}", lambda place: user if place[1] == "user" else about, form), lead

    def _one_turn(self, answer: str) -> str:
        """An answer without white space around it, and without what would end it."""
        answer = self._without_marks(answer.replace("\r\n", "\n").strip())
        return re.sub("\n+", "\n", answer) if any(stop in answer for stop in self.stops) else answer

    def clean(self, message: str) -> str:
        """A message as the model gets to see it; InputError if nothing is left of it."""
        if not isinstance(message, str):
            raise InputError(f"a message must be a text, got {show(message)}")
        message = self._without_marks(message.replace("\r\n", "\n")).strip()
        if not message:
            raise InputError("the message is empty")
        return re.sub("\n+", "\n", message) if self.collapse else message

    def _without_marks(self, text: str) -> str:
        """The text without the mark that ends a message, where the template has one."""
        mark = self.separator.strip()
        return text.replace(mark, "") if mark else text


RAVEN = Template("Bob: {user}\n\nAlice:", stops=("\n\n",), tool_style=None)
WORLD = Template("User: {user}\n\nAssistant:")
G1 = Template("User: {user}\n\nAssistant:", system="System: {system}\n\n")
STORY = Template("User: {user}\n\nAssistant:", collapse=False, sampling={"temperature": 0.8, "top_p": 0.85})
ALPACA = Template(
    "### Instruction: {user}\n### Response:",
    stops=("\n\n### Instruction:", "\n### Instruction:"),
    turn_with_input="### Instruction: {user}\n### Input: {input}\n### Response:",
    tool_style=None,
)
BELOW = "Below is an instruction that describes a task"
COMPLETE = "Write a response that appropriately completes the request.\n\n"
RAVEN_ALPACA = Template(
    f"{BELOW}. {COMPLETE}# Instruction:\n{{user}}\n\n# Response:\n",
    stops=(f"\n\n{BELOW}", "\n\n# Instruction:"),
    turn_with_input=f"{BELOW}, paired with an input that provides further context. {COMPLETE}"
    "# Instruction:\n{user}\n\n# Input:\n{input}\n\n# Response:\n",
    tool_style=None,
)
INSTRUCTION = Template(
    "Instruction: {user}\n\nResponse:",
    stops=("\n\nInstruction:",),
    turn_with_input="Instruction: {user}\n\nInput: {input}\n\nResponse:",
    tool_style=None,
)
QUESTION = Template("Question: {user}\n\nAnswer:", stops=("\n\nQuestion:",), tool_style=None)
BOT = Template("User✿{user}✿\nBot✿", "System✿{system}✿\n", "✿\n", ("✿",), tool_style="function_calling")
FUNCTION_CALLING = Template(  # conversations with tools, whatever the template of the others is; see tool_styles.py
    "### User\n{user}\n### Assistant\n<think></think",
    "### System\n{system}\n",
    "\n",
    ("\n### User", "\n### System", "\n### Assistant", "\n### Tool Output"),
    tool="### Tool Output\n{tool}\n",
    tool_style="function_calling",
)
TEMPLATES = {
    "raven": RAVEN,
    "world": WORLD,
    "g1": G1,
    "g1-think": G1.with_opening("<think"),
    "g1-fast-think": G1.with_opening("<think>\n</think"),
    "story": STORY,
    "alpaca": ALPACA,  # as in Hugging Face's blog post on RWKV
    "raven-alpaca": RAVEN_ALPACA,  # as Raven was trained on Alpaca's data
    "instruction": INSTRUCTION,  # as World was trained on such data
    "qa": QUESTION,
    "bot": BOT,
}


def parse_template(text: str) -> Template:
    r"""A template written as one turn, such as "Bob: {user}\n\nAlice:", perhaps with a system text in front of it:
    "System: {system}\n\nBob: {user}\n\nAlice:". An answer ends where the model begins the next turn.
    """
    first = re.match(r".*\{system\}\s*", text, re.DOTALL)
    system = first[0] if first else WORLD.system
    turn = text[len(system) if first else 0 :].rstrip(" ")
    label, _, lead = turn.partition("{user}")
    separator = lead[: len(lead) - len(lead.lstrip("\n"))] or "\n\n"
    made = Template(turn, system, separator, (separator + label.rstrip(),))
    known = (x for x in TEMPLATES.values() if replace(x, stops=x.stops[:1], tool_style=made.tool_style) == made)
    return next(known, made)


def template_from(fields: dict[str, Any]) -> Template:
    """Undoes what JSON does to a Template: tuples became lists, and token ids text."""
    sampling = dict(fields["sampling"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    return Template(**{**fields, "stops": tuple(fields["stops"]), "sampling": sampling})
