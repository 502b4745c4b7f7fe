"""The terminal loop of `heronry chat`: messages, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Generator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ..engine.chat import Chat
from ..engine.completion import Completion
from ..engine.options import DecodeOptions
from ..errors import InputError

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  gives input() a history and line editing

HELP = """\
/undo           take back the last message and its answer
/retry          another answer to the last message
/fork NAME      start a branch here; the current one stays as it is
/switch NAME    move to another branch; without a name: list them
/save FILE      save all branches with their states
/load FILE      continue a saved conversation
/quit           leave (so does Ctrl-D); Ctrl-C only ends an answer early
\"\"\"             begins and ends a message of several lines"""


def run_chat_loop(chat: Chat, session: Path | None, max_tokens: int, seed: int | None, sampling: DecodeOptions) -> None:
    """Read messages and commands until the end of input.

    Args:
        session: a file to continue from, if it exists, and to save the conversation in after every change.
        max_tokens: of each answer.
        seed: of the first answer; each further one takes the next.
        sampling: fields of Sampling that override the template's.
    """
    console = Console(highlight=False, emoji=False)
    terminal = sys.stdin.isatty()
    if session is not None and session.exists():
        chat.load(session)
        _show(console, chat)
    if terminal:
        console.print("[dim]/help lists the commands[/dim]")

    answers = 0
    while (line := _read(chat.branch, terminal)) is not None:
        if line in ("/quit", "/exit"):
            return
        try:
            if seed is not None:  # another answer to the same message needs another seed
                sampling["seed"] = seed + answers
            if line.startswith("/"):
                words = shlex.split(line[1:])
                if session is not None and words[:1] == ["load"]:  # the session file would be overwritten
                    raise InputError(
                        f"this conversation is saved in {session}: leave it and start again with --session FILE"
                    )
                answer = _command(console, chat, words, max_tokens, sampling)
            else:
                answer = chat.say(line, stream=True, max_tokens=max_tokens, **sampling)
            if answer is not None:
                answers += 1
                _stream(answer)
            if session is not None:
                chat.save(session)
        except KeyboardInterrupt:  # between the end of an answer and the next message
            print()
        except (OSError, ValueError) as error:  # ValueError: an unclosed quotation mark
            console.print(f"[red]{escape(str(error))}[/red]")


def _command(
    console: Console, chat: Chat, words: list[str], max_tokens: int, sampling: DecodeOptions
) -> Generator[Completion, None, None] | None:
    """Run the command that `words` spell, without the slash; returns an answer to stream, if it gives one."""
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
            raise InputError(f"/{' '.join(words)} is not a command, or has the wrong arguments; see /help")
    return None


def _read(branch: str, terminal: bool) -> str | None:
    """Read the next message or command; None at the end of input."""
    prompt = "" if not terminal else "> " if branch == "main" else f"{branch} > "
    while True:
        try:
            line = input(prompt).strip()
            if line == '"""':
                lines = []
                while (more := input("")).strip() != '"""':
                    lines.append(more)
                line = "\n" + "\n".join(lines)  # a message, even if it begins with a slash
        except KeyboardInterrupt:  # discards the line, not the conversation
            print("\n(leave with Ctrl-D or /quit)")
            continue
        except EOFError:
            return None
        if line:
            return line


def _stream(pieces: Generator[Completion, None, None]) -> None:
    """Print an answer as it comes. Ctrl-C ends it early; what came so far stays in the conversation."""
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)


def _note(console: Console, text: str) -> None:
    """Print what a command has done, dimmed."""
    console.print(f"[dim]{escape(text)}[/dim]")


def _show(console: Console, chat: Chat) -> None:
    """Print the conversation so far."""
    for message in chat.messages:
        console.print(f"[dim]{message['role']}:[/dim] {escape(message['content'])}")
