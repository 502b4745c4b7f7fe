"""The loop of `heronry chat`: messages, and commands that begin with a slash."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.markup import escape

from ..engine.chat import Chat
from ..engine.completion import Completion
from ..engine.options import DecodeOptions
from ..engine.sampling import UnseededOptions
from ..errors import InputError, count, unknown_name
from ..faults import describe
from ..text.template_choice import describe_template
from ..text.terminal import printable

COMMANDS = {
    "/undo": "take back the last message and its answer",
    "/retry": "another answer to the last message",
    "/continue": "more of the last answer, if it was cut off",
    "/fork NAME": "start a branch here; the current one stays as it is",
    "/switch NAME": "move to another branch; without a name: list them",
    "/clear": "start a branch with nothing said yet",
    "/history": "show the conversation so far",
    "/system TEXT": "start a branch with this system text; without one: show it",
    "/set NAME VALUE": "change temperature, top_p, max_tokens, ...; without a value or a name: show what was set; "
    "none as a value: back to the default",
    "/save FILE": "save all branches with their states",
    "/load FILE": "continue a saved conversation",
    "/help": "show this list",
    "/quit": "leave (so do /exit, quit, exit and Ctrl-D); Ctrl-C only ends an answer early",
}
MANY_LINES = '''"""               begins and ends a message of several lines; a pasted one needs none'''
HELP = "\n".join(f"{name:18}{what}" for name, what in COMMANDS.items()) + "\n" + MANY_LINES
SETTINGS = {  # what /set changes, and from which type
    **{name: kind for name, kind in get_type_hints(UnseededOptions).items() if name != "logit_bias"},
    "max_tokens": int,
    "seed": int,
}
PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: {"on": True, "off": False}.__getitem__,
}


def run_chat_loop(chat: Chat, session: Path | None, max_tokens: int, seed: int | None, sampling: DecodeOptions) -> int:
    """Read messages and commands until the end of input; see `Loop`.

    Returns:
        The exit code: 2 if a line of a pipe gave an error, else 0.
    """
    return Loop(chat, session, max_tokens, seed, sampling).run()


class Loop:
    """A conversation with somebody at a terminal, or with the lines of a pipe.

    Attributes:
        chat: the conversation.
        session: a file to continue from, if it exists, and to save the conversation in after every change.
        max_tokens, first_max_tokens: of each answer, now and at the beginning.
        seed: of the first answer; each further one takes the next.
        sampling: fields of Sampling that override the template's.
        answers: given so far, since the seed was set.
        failed: whether there was an error.
    """

    def __init__(self, chat: Chat, session: Path | None, max_tokens: int, seed: int | None, sampling: DecodeOptions):
        self.chat, self.session = chat, session
        self.max_tokens, self.seed, self.sampling = max_tokens, seed, sampling
        self.first_max_tokens = max_tokens
        self.answers = 0
        self.failed = False
        self.console = Console(highlight=False, emoji=False)
        self.errors = Console(highlight=False, emoji=False, stderr=True, soft_wrap=True)
        self.notes = self.console if sys.stdout.isatty() else self.errors  # a file or a pipe gets the answers alone
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """See `run_chat_loop`."""
        if self.session is not None and self.session.exists():
            self.chat.load(self.session)
        read = _read_line
        if self.terminal:
            from .prompt import Prompt

            read = Prompt(self.chat_branches).read
            llm = self.chat.llm
            model = f"{llm.model.name}, {llm.num_parameters() / 1e6:,.3g} M parameters, {llm.dtype} on {llm.device}"
            self._note(
                f"{model}; template {describe_template(self.chat.template)}; /help lists the commands".replace(
                    "torch.", ""
                )
            )
        if self.chat.messages:
            self._show()
        while (line := read("> " if self.chat.branch == "main" else f"{self.chat.branch} > ")) is not None:
            if line in ("/quit", "/exit") or (self.terminal and line in ("quit", "exit")):
                break
            try:
                self._answer_or_obey(line)
            except KeyboardInterrupt:  # between the end of an answer and the next message
                if not self.terminal:
                    raise
                print()
            except Exception as error:
                if isinstance(error, OSError) and error.filename is None:  # standard output
                    raise
                self._tell(error)
        return 2 if self.failed and not self.terminal else 0

    def _tell(self, error: Exception) -> None:
        """Say what is wrong and go on; an error of heronry's own is raised again."""
        if (line := describe(error)) is None:
            raise error
        self.failed = True
        line = escape(printable(line))
        self.errors.print(f"[red]{line}[/red]" if self.terminal else f"heronry: {line}")

    def chat_branches(self) -> tuple[str, ...]:
        """Names of the branches, for Tab."""
        return self.chat.branches

    def _answer_or_obey(self, line: str) -> None:
        options: DecodeOptions = {**self.sampling}
        if self.seed is not None:  # another answer to the same message needs another seed
            options["seed"] = self.seed + self.answers
        if line.startswith("/") and "\n" not in line:
            answer = self._command(line, options)
        else:
            answer = self.chat.say(line, stream=True, max_tokens=self.max_tokens, **options)
        if answer is not None:
            self.answers += 1
        try:
            if answer is not None:
                self._stream(answer)
        finally:  # what was said before Ctrl-C or SIGTERM is kept too
            if self.session is not None:
                try:
                    self._save(self.session)
                except Exception as error:  # must not take the place of what ends the chat
                    self._tell(error)

    def _save(self, path: Path) -> None:
        """Save the conversation in a new file, or in the one that it is from."""
        path = path.expanduser()
        if path.exists() and path.resolve() != self.chat.path:
            raise InputError(f"{path}: already exists; choose another name")
        self.chat.save(path)

    def _command(self, line: str, options: DecodeOptions) -> Generator[Completion, None, None] | None:
        """Run a command; returns an answer to stream, if it gives one."""
        chat = self.chat
        if line.startswith("/system "):  # its text needs no quotation marks
            words = ["system", line.removeprefix("/system ").strip()]
        else:
            try:
                words = shlex.split(line[1:])
            except ValueError as error:
                raise InputError(f"{line}: {str(error).lower()}; see /help") from error
        match words:
            case ["undo"]:
                self._note(f"took back: {chat.undo()}")
            case ["retry"]:
                answer = chat.retry(stream=True, max_tokens=self.max_tokens, **options)
                if self.terminal:
                    self._note(f"again: {chat.messages[-2]['content']}")
                return answer
            case ["continue"]:
                return chat.go_on(stream=True, max_tokens=self.max_tokens, **options)
            case ["fork", name]:
                chat.fork(name)
            case ["switch"]:
                for name in chat.branches:
                    self._note(("* " if name == chat.branch else "  ") + name)
            case ["switch", name]:
                chat.switch(name)
                self._show()
            case ["clear"]:
                self._begin()
            case ["history"]:
                self._show()
            case ["system"]:
                first = chat.messages[:1]
                self._note(first[0]["content"] if first and first[0]["role"] == "system" else "no system text")
            case ["system", text]:
                self._begin(text)
            case ["set"]:
                for name, value in self._settings().items():
                    self._note(f"{name} {value}")
            case ["set", name]:
                name = _setting_name(name)
                self._note(f"{name} {self._settings().get(name)}")
            case ["set", name, value]:
                self._set(name, value)
            case ["save", path]:
                if self.session is not None:  # from then on the other file would be this conversation's own
                    raise InputError(f"this conversation is saved in {self.session} after every answer; copy that file")
                self._save(Path(path))
                self._note(f"saved to {path}")
            case ["load", path]:
                if self.session is not None:  # its file would be overwritten
                    raise InputError(
                        f"this conversation is saved in {self.session}: leave it and start again with --session FILE"
                    )
                if not chat.is_saved:
                    raise InputError("this conversation is not saved, and would be lost: /save FILE first")
                chat.load(path)
                self._show()
            case ["help"]:
                self._note(HELP)
            case _:
                raise _misread(line)
        return None

    def _begin(self, system: str | None = None) -> None:
        """Goes on in a branch with nothing said yet."""
        chat, before = self.chat, self.chat.branch
        chat.begin(next(name for n in itertools.count(2) if (name := str(n)) not in chat.branches), system)
        self._note(f"a new branch, {chat.branch}; /switch {before} goes back")

    def _set(self, name: str, text: str) -> None:
        """Change an option of the answers from now on; "none" takes it back."""
        name = _setting_name(name)
        changed: Any = {"max_tokens": self.max_tokens, "seed": self.seed, **self.sampling}
        if text == "none":
            changed.pop(name, None)
            changed.setdefault("max_tokens", self.first_max_tokens)
        else:
            try:
                changed[name] = PARSERS[SETTINGS[name]](text)
            except (ValueError, KeyError):
                what = "on or off" if SETTINGS[name] is bool else "a number"
                raise InputError(f"{name} must be {what}, got {text!r}") from None
        self.chat.check_options(**changed)
        self.max_tokens = changed.pop("max_tokens")
        if name == "seed":
            self.answers = 0
        self.seed = changed.pop("seed", None)
        self.sampling = changed

    def _settings(self) -> dict[str, Any]:
        """What was set, by the template or since."""
        return {**self.chat.template.sampling, **self.sampling, "max_tokens": self.max_tokens, "seed": self.seed}

    def _stream(self, pieces: Generator[Completion, None, None]) -> None:
        """Print an answer as it comes. Ctrl-C ends it early; what came so far stays in the conversation."""
        start, last = time.perf_counter(), None

        def texts() -> Generator[str, None, None]:
            nonlocal last
            for piece in pieces:
                last = piece
                yield printable(piece.text) if sys.stdout.isatty() else piece.text

        try:
            if self.terminal:
                from .markdown import print_markdown

                print_markdown(self.console, texts())
            else:
                for text in texts():
                    print(text, end="", flush=True)
        except KeyboardInterrupt:  # while the model computed, or while its answer was drawn
            pieces.close()
            if not self.terminal:
                raise
        if not self.terminal:
            print(flush=True)
        elif last is not None:
            n_tokens = last.usage.completion_tokens
            line = f"{count(n_tokens, 'token')}, {n_tokens / (time.perf_counter() - start):.0f} tokens/s"
            if last.finish_reason == "length":
                line += f"; cut at max_tokens, /set max_tokens {2 * self.max_tokens} allows more"
            self._note(line)

    def _note(self, text: str) -> None:
        """Print what a command has done, dimmed."""
        self.notes.print(f"[dim]{escape(printable(text))}[/dim]", soft_wrap=not self.terminal)

    def _show(self) -> None:
        """Print the conversation so far; further lines of a message are indented."""
        if not self.chat.messages:
            self._note("nothing was said yet")
        for message in self.chat.messages:
            text = re.sub(r"\n(?!\n)", "\n  ", printable(message["content"]))
            self.notes.print(f"[dim]{message['role']}:[/dim] {escape(text)}", soft_wrap=not self.terminal)


def _misread(line: str) -> InputError:
    """What is wrong with a line that is no command, or has the wrong arguments."""
    usage = {form.partition(" ")[0]: form for form in COMMANDS}
    name = line.split()[0]
    return InputError(f"{line}: usage is {usage[name]}") if name in usage else unknown_name("command", name, usage)


def _setting_name(name: str) -> str:
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise unknown_name("setting", name, SETTINGS)
    return name


def _read_line(prompt: str) -> str | None:
    """The next message or command of a pipe; None at the end."""
    while line := sys.stdin.readline():
        line = line.strip()
        if line == '"""':
            lines = []
            while (more := sys.stdin.readline()) and more.strip() != '"""':
                lines.append(more.rstrip("\n"))
            line = "\n" + "\n".join(lines)  # a message, even if it begins with a slash
        if line:
            return line
    return None
