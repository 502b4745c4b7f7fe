"""The line that `heronry chat` reads from a terminal: a paste is one message, Tab completes commands, and what was
typed is kept from one session to the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from .chat_loop import COMMANDS, SETTINGS


class Prompt:
    """Reads messages and commands."""

    def __init__(self, branches: Callable[[], Iterable[str]]):
        """branches: the names that /switch takes."""
        keys = KeyBindings()
        keys.add("escape", "enter")(_insert_line_break)  # Alt-Enter
        self._session: PromptSession[str] = PromptSession(
            history=_open_history(),
            completer=CommandCompleter(branches),
            complete_while_typing=False,
            key_bindings=keys,
        )

    def read(self, prompt: str) -> str | None:
        """The next message or command; None at the end of input."""
        while True:
            try:
                line = self._session.prompt(prompt).strip()
                if line == '"""':
                    lines = []
                    while (more := self._session.prompt("")).strip() != '"""':
                        lines.append(more)
                    line = "\n" + "\n".join(lines)  # a message, even if it begins with a slash
            except KeyboardInterrupt:  # discards the line, not the conversation
                print("(leave with Ctrl-D or /quit)")
                continue
            except EOFError:
                return None
            if line:
                return line


class CommandCompleter(Completer):
    """Commands at the beginning of a line, then their arguments."""

    def __init__(self, branches: Callable[[], Iterable[str]]):
        self.branches = branches

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            names = [name.split(" ")[0] for name in COMMANDS]
            completer: Completer = WordCompleter(names, WORD=True) if command.startswith("/") else WordCompleter([])
        elif command in ("/save", "/load"):
            completer = PathCompleter(expanduser=True)
        else:
            words = self.branches() if command == "/switch" else SETTINGS if command == "/set" else ()
            completer = WordCompleter(list(words), WORD=True)
        yield from completer.get_completions(Document(rest if space else command), complete_event)


class PrivateHistory(FileHistory):
    """A file that only its owner can read; one that cannot be written costs the history, not the conversation."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            yield from super().load_history_strings()
        except OSError:
            return

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            os.close(os.open(self.filename, os.O_CREAT | os.O_WRONLY, 0o600))
            super().store_string(string)


def _open_history() -> History:
    """What was typed before: in $XDG_STATE_HOME/heronry or ~/.local/state/heronry."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "heronry"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home directory, or none that can be written
        return InMemoryHistory()
    return PrivateHistory(str(folder / "chat_history"))


def _insert_line_break(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")
