"""Chat templates in the form of Hugging Face's: a text in the language Jinja.

- `to_jinja` writes ours in that form
- a `JinjaTemplate` is one from outside: all that a chat must know of it is told from how it renders conversations
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import InputError, show
from .jinja_process import jinja_process
from .templates import FOCUSED, TEMPLATES, Template

# a conversation that shows how a template looks
QUESTION, ANSWER, NEXT = "heronry-question", "heronry-answer", "heronry-next"
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def chat_template(name: str) -> str:
    """A template of TEMPLATES (raven, world, g1 ...) by its name, for `tokenizer.chat_template`."""
    if name not in TEMPLATES:
        raise InputError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return to_jinja(TEMPLATES[name])


def to_jinja(template: Template) -> str:
    """The same template in Jinja. A message may have an "input" beside its content."""
    before_user, before_answer = template.turn.split("{user}")
    before_system, after_system = template.system.split("{system}")
    collapse = "{%- set ns.text = ns.text.split('\\n') | select | join('\\n') %}"  # runs of newlines become one
    clean = collapse if template.collapse else ""
    mark = template.separator.strip()
    unmarked = f".replace({mark!r}, '')" if mark else ""
    forged = " or ".join(f"{stop!r} in ns.text" for stop in template.stops)
    if template.turn_with_input is None:
        begin_input = f"{{%- if about %}}{{%- set ns.text = (ns.text + '\\n' + about).strip() %}}{clean}{{%- endif %}}"
        question, lead = f"{before_user!r} + ns.text", repr(before_answer.removesuffix(template.opening))
        full_lead = repr(before_answer)
    else:
        before, between, after = re.split(r"\{user\}|\{input\}", template.turn_with_input)
        begin_input = (
            "{%- if about %}{%- set question = ns.text %}{%- set ns.text = about %}"
            f"{clean}{{%- set ns.text = {before!r} + question + {between!r} + ns.text %}}"
            f"{{%- else %}}{{%- set ns.text = {before_user!r} + ns.text %}}{{%- endif %}}"
        )
        question = "ns.text"
        lead = full_lead = f"({after!r} if about else {before_answer!r})"
    return (
        "{%- for message in messages %}"
        "{%- set ns = namespace(text=message['content'].replace('\\r\\n', '\\n')"
        f"{unmarked}.strip()) %}}"
        "{%- if message['role'] == 'assistant' %}"
        f"{{%- if {forged} %}}{collapse}{{%- endif %}}"
        f"{{{{- ({template.space!r} + ns.text if ns.text else '') + {template.separator!r} }}}}"
        "{%- else %}"
        f"{clean}"
        f"{{%- if message['role'] == 'system' %}}{{{{- {before_system!r} + ns.text + {after_system!r} }}}}"
        "{%- else %}{%- set about = (message['input'] or '').replace('\\r\\n', '\\n')"
        f"{unmarked}.strip() %}}"
        f"{begin_input}{{{{- {question} }}}}"
        f"{{%- if not loop.last %}}{{{{- {lead} }}}}"
        f"{{%- elif add_generation_prompt %}}{{{{- {full_lead} }}}}{{%- endif %}}"
        "{%- endif %}{%- endif %}{%- endfor %}"
    )


class Answer(NamedTuple):
    """Where an answer is in the text of a conversation, with the space in front of it."""

    begin: int
    end: int


class _Look(NamedTuple):
    """How a template shows a turn."""

    opening: str
    space: str
    separator: str
    stop: str


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template from outside. It is rendered in a sandbox and in a process of its own, with limits of time and
    memory.

    source: the text in Jinja.
    name: of the file it is from, for errors.
    stop_strings: what ends an answer, besides the end of text; without any it is the text between an answer and the
        next message.
    tokens: bos_token, eos_token and others, as texts that the template may show.
    sampling: as in `Template`.
    """

    source: str
    name: str = "chat template"
    stop_strings: tuple[str, ...] = ()
    tokens: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=lambda: FOCUSED)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        answering: bool,
        mark: str = "",
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation; with `answering`, up to where the next answer begins. variables: others that the
        template may look at, such as tools.

        Raises:
            InputError: the template is damaged, refuses these messages, or takes too long or too much memory.
        """
        [text] = self._render((messages, answering), mark=mark, others=variables)
        return text

    def _render(
        self,
        *conversations: tuple[Sequence[Mapping[str, Any]], bool],
        mark: str = "",
        others: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[str]:
        """The texts of several conversations, within the limit of time for one; see `render`."""
        has_input = re.search(r"\binput\b", self.source)
        variables: list[dict[str, Any]] = []
        for messages, answering in conversations:
            shown = [*messages] if has_input else [_with_input(message) for message in messages]
            variables.append({**self.tokens, "messages": shown, "tools": None, "documents": None})
            variables[-1] |= {"add_generation_prompt": answering, **others}
        try:
            return jinja_process.render(self.source, mark, *variables)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    @property
    def text(self) -> str:
        """The template alone, with the tokens that it shows, as `find_template` takes it."""
        shown = {name: x for name, x in self.tokens.items() if re.search(rf"\b{name}\b", self.source)}
        return "".join(f"{{% set {name} = {x!r} %}}\n" for name, x in shown.items()) + self.source

    @cached_property
    def _look(self) -> _Look:
        next_message = {"role": "user", "content": NEXT}
        whole, prompt, longer = self._render((TALK, False), (TALK[:1], True), ([*TALK, next_message], True))
        if QUESTION not in whole or ANSWER not in whole or not re.search(f"{ANSWER}.*{NEXT}", longer, re.DOTALL):
            raise InputError(f"{self.name}: does not show the messages of a conversation")
        before, separator = whole.split(ANSWER, 1)
        lead = before[: _common(before, prompt)].rstrip(" ")  # a word is one token with the space in front of it
        stop = longer.split(ANSWER, 1)[1].split(NEXT)[0].rstrip()
        return _Look(prompt[len(lead) :], before[len(lead) :], separator, stop or separator)

    @property
    def opening(self) -> str:
        """What an answer begins with before the model writes, beyond what it has in front of it in earlier turns."""
        return self._look.opening

    @property
    def separator(self) -> str:
        """What comes between an answer and the next turn."""
        return self._look.separator

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer, besides the end of text."""
        return self.stop_strings or ((self._look.stop,) if self._look.stop else ())

    def clean(self, message: str) -> str:
        """The message as it is, for the template cleans it; InputError if there is none."""
        if not isinstance(message, str):
            raise InputError(f"a message must be a text, got {show(message)}")
        if not message.strip():
            raise InputError("the message is empty")
        return message

    def begin_answer(self, text: str) -> tuple[str, str]:
        """As `Template.begin_answer`."""
        opening, space = self.opening, self._look.space
        text = f"{space}{text.strip()}"
        return (opening, text[len(opening) :]) if text.startswith(opening) else ("", text)

    def extend(self, text: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation up to where the next answer begins. It need not begin with `text`, as which the
        messages but the last were read: a template may show earlier turns in another way."""
        return self.render(messages, True)

    def render_history(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Nothing: how a template shows messages may depend on those that follow."""
        return ""

    def find_answers(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Answer]]:
        """The text of whole turns, and where in it each answer is, what ends it included: between the marks of
        {% generation %}, or else told from the text without it.

        Raises:
            InputError: as `render`; or an answer cannot be told apart.
        """
        if re.search(r"\{%-?\s*generation\b", self.source):
            return self._find_marked(messages)
        text = self.render(messages, False)
        answers: list[Answer] = []
        for i in range(1, len(messages)):
            if messages[i]["role"] == "assistant":
                asked, answered = self.render(messages[:i], True), self.render(messages[: i + 1], False)
                begin = _common(asked, text)
                if not text.startswith(answered) or begin < (answers[-1].end if answers else 0):
                    raise InputError(
                        f"{self.name}: shows earlier answers otherwise than the last one, so it must mark answers with "
                        "{% generation %}"
                    )
                answers.append(Answer(len(text[:begin].rstrip(" ")), len(answered)))
        return text, answers

    def _find_marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Answer]]:
        written = "".join(str(value) for message in messages for value in message.values())
        mark = next(mark for i in range(len(written) + 1) if (mark := f"\x02{i}\x03") not in written)
        pieces = self.render(messages, False, mark).split(mark)
        n_answers = sum(message["role"] == "assistant" for message in messages)
        if len(pieces) != 2 * n_answers + 1:
            raise InputError(f"{self.name}: marks {len(pieces) // 2} texts with {{% generation %}}, not {n_answers}")
        text, answers = pieces[0], []
        for answer, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            answers.append(Answer(len(text.rstrip(" ")), len(text + answer)))
            text += answer + rest
        return text, answers


def _with_input(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose input is a part of its text."""
    about = message.get("input")
    rest = {key: value for key, value in message.items() if key != "input"}
    return rest | {"content": f"{message['content']}\n{about}"} if about else rest


def _common(a: str, b: str) -> int:
    """The length of the beginning that two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
