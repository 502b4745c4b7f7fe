"""`heronry chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..engine.chat import Chat
from ..errors import InputError

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  with it, input() has a history and can be edited

HELP = """\
/undo           take the last message and its answer back
/retry          another answer to the last message
/fork NAME      begin a branch here; the one you are on stays as it is
/switch NAME    go on in another branch; without a name: list them
/save FILE      keep all branches with their states
/load FILE      go on with a saved conversation
/quit           leave (so does Ctrl-D); Ctrl-C only ends an answer early
\"\"\"             begins and ends a message of several lines"""


def talk(chat: Chat, session: Path | None, max_tokens: int, seed: int | None, sampling: dict[str, Any]) -> None:
    """Reads messages and commands until the end of input.

    session: a file to go on from, if it exists, and to keep the conversation in after every change.
    seed: of the first answer; each further one takes the next.
    """
    console = Console(highlight=False, emoji=False)
    terminal = sys.stdin.isatty()
    if session is not None and session.exists():
        chat.load(session)
        _show(console, chat)
    if terminal:
        console.print("[dim]/help tells the commands[/dim]")

    answers = 0
    while (line := _read(chat.branch, terminal)) is not None:
        if line in ("/quit", "/exit"):
            return
        try:
            if seed is not None:  # another answer to the same message is another draw
                sampling["seed"] = seed + answers
            if line.startswith("/"):
                words = shlex.split(line[1:])
                if session is not None and words[:1] == ["load"]:  # it would be written over with the other one
                    raise InputError(f"this conversation is kept in {session}: leave it, then begin with --session")
                answer = _command(console, chat, words, max_tokens, sampling)
            else:
                answer = chat.say(line, stream=True, max_tokens=max_tokens, **sampling)
            if answer is not None:
                answers += 1
                _stream(answer)
            if session is not None:
                chat.save(session)
        except KeyboardInterrupt:  # between the answer's end and the next message
            print()
        except (OSError, ValueError) as error:  # ValueError: shlex misses a quotation mark
            console.print(f"[red]{escape(str(error))}[/red]")


def _command(
    console: Console, chat: Chat, words: list[str], max_tokens: int, sampling: dict[str, Any]
) -> Iterator[str] | None:
    """Carries out what followed a slash; returns an answer to stream, if there is one."""
    match words:
        case ["undo"]:
            _note(console, f"took back: {chat.undo()}")
        case ["retry"]:
            return chat.retry(stream=True, max_tokens=max_tokens, **sampling)
        case ["fork", name]:
            chat.fork(name)
        case ["switch"]:
            for name in chat.branches:
                _note(console, ("* " if name == chat.branch else "  ") + name)
        case ["switch", name]:
            chat.switch(name)
            _show(console, chat)
        case ["save", path]:
            chat.save(path)
            _note(console, f"saved to {path}")
        case ["load", path]:
            chat.load(path)
            _show(console, chat)
        case ["help"]:
            _note(console, HELP)
        case _:
            raise InputError(f"/{' '.join(words)} is no command, or not with these words; /help tells how they go")
    return None


def _read(branch: str, terminal: bool) -> str | None:
    """The next message or command; None at the end."""
    prompt = "" if not terminal else "> " if branch == "main" else f"{branch} > "
    while True:
        try:
            line = input(prompt).strip()
            if line == '"""':
                lines = []
                while (more := input("")).strip() != '"""':
                    lines.append(more)
                line = "\n" + "\n".join(lines)  # a message, even if it begins with a slash
        except KeyboardInterrupt:  # throws away the line, not the conversation
            print("\n(Ctrl-D or /quit leaves)")
            continue
        except EOFError:
            return None
        if line:
            return line


def _stream(pieces: Iterator[str]) -> None:
    """Prints an answer as it comes. Ctrl-C ends it early: what was said stays said."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    print(flush=True)


def _note(console: Console, text: str) -> None:
    console.print(f"[dim]{escape(text)}[/dim]")


def _show(console: Console, chat: Chat) -> None:
    """The conversation so far."""
    for message in chat.messages:
        console.print(f"[dim]{message['role']}:[/dim] {escape(message['content'])}")
