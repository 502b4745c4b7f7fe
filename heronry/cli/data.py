"""`heronry data`: texts on one side, a token file on the other."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.sources import find
from ..data.tokenize_corpus import Standing, prepare
from ..errors import InputError
from ..text.chat_templates import TEMPLATES, Template
from ..text.tokenizers import guess, load_tokenizer

MOST_WORKERS = min(8, os.cpu_count() or 1)  # beyond that the process that reads cannot keep up


@dataclass(frozen=True)
class Dialogue:
    """Messages as `template` shows them, in the pieces that engine/chat.py encodes.

    A chat encodes the system text, and then every turn: the message with the beginning of the answer. What the model
    writes after it is the answer and the separator (a turn that ended otherwise is `owed` it, see there). So a piece
    is a turn, or an answer with the separator behind it. The loss counts what the model must write by itself: the
    answers and all of the stop text behind them. That of world and g1, "\\n\\nUser:", ends in the next turn.
    The last answer is followed by the end of text, or by the stop text where the tokenizer has no such id.

    marked: whether it has.
    """

    template: Template
    marked: bool

    def __call__(self, messages: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
        """Pieces, each with the number of characters at its beginning that count in the loss.

        Raises:
            InputError: messages that are not of user and assistant in turn, after at most one system text. A last
                message without an answer is left out.
        """
        template = self.template
        said = [_said(message) for message in messages]
        pieces: list[tuple[str, int]] = []
        if said and said[0][0] == "system":
            pieces.append((template.system.replace("{system}", template.clean(said.pop(0)[1])), 0))
        if len(said) < 2 or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(said)):
            raise InputError("the messages are not of user and assistant in turn")
        stop, separator = template.stops[0], template.separator
        turns = len(said) // 2
        for i in range(turns):
            turn = template.turn.replace("{user}", template.clean(said[2 * i][1]))
            ends = len(stop) - len(separator) if i and (separator + turn).startswith(stop) else 0
            pieces.append((turn, max(0, ends)))
            answer = self._answer(said[2 * i + 1][1])
            answer += separator if i < turns - 1 else "" if self.marked else stop
            pieces.append((answer, len(answer)))
        return pieces

    def _answer(self, text: str) -> str:
        """What comes after the beginning that the template makes: "Assistant:", or some of the thinking too."""
        text = text.replace("\r\n", "\n").strip()
        if not text:
            raise InputError("an answer is empty")
        if any(stop in text for stop in self.template.stops):  # where a chat would stop listening
            text = re.sub("\n+", "\n", text)
        begun = self.template.turn.rpartition(":")[2]
        if f" {text}".startswith(begun):
            return f" {text}"[len(begun) :]
        if begun.endswith("</think"):  # it skips the thinking, so answers need not have any
            return f">\n{text}"
        raise InputError(f"an answer does not begin with {begun.strip()!r}, as the template does")


def _said(message: dict[str, Any]) -> tuple[str, str]:
    role, text = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(text, str):
        raise InputError("a message has no role or no content")
    return role, text


def data(
    sources: list[str],
    out: Path,
    tokenizer: str,
    template: str | None,
    workers: int | None,
    key: str,
    holdout: float,
    restart: bool,
) -> None:
    """Encodes `sources` into the token file `out`, or goes on doing so."""
    if template is not None and template not in TEMPLATES:
        raise InputError(f"there is no chat template {template!r}; known are {', '.join(TEMPLATES)}")
    spec = _tokenizer(tokenizer)
    render = None
    if template is not None:
        render = Dialogue(TEMPLATES[template], bool(load_tokenizer(spec).stop_ids))
    sizes = [source.size for source in find(sources)]
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None if None in sizes else sum(size or 0 for size in sizes))
        first: Standing | None = None  # tokens of an earlier run are none of this one's speed
        read = 0

        def tell(done: int, standing: Standing) -> None:
            nonlocal first, read
            first, read = first or standing, done
            made = f"{standing.documents:,} documents, {standing.tokens:,} tokens"
            progress.update(bar, completed=done, description=made)

        try:
            standing = prepare(
                sources,
                out,
                spec,
                key=key,
                render=render,
                template=template,
                holdout=holdout,
                workers=MOST_WORKERS if workers is None else workers,
                restart=restart,
                tell=tell,
            )
        except KeyboardInterrupt:
            progress.stop()
            print("heronry: stopped; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
    speed = (standing.tokens - (first.tokens if first else standing.tokens)) / (time.monotonic() - began)
    told = f"{standing.documents:,} documents, {standing.tokens:,} tokens of {read:,} bytes, {speed:,.0f} tokens/s"
    if holdout:
        told += f"; {standing.held.documents:,} documents, {standing.held.tokens:,} tokens held out"
    console.print(f"{out}: {told}", highlight=False, markup=False, soft_wrap=True)


def _tokenizer(name: str) -> str:
    """ "bytes", "world" or a tokenizer.json, which a model's folder may hold or tell by its vocabulary."""
    path = Path(name).expanduser()
    if name in ("bytes", "world") or not path.is_dir():
        return name if name in ("bytes", "world") else str(path)
    file = path / "config.json"
    if not file.is_file():
        return str(path / "tokenizer.json")
    try:
        return str(guess(json.loads(file.read_text(encoding="utf-8"))["vocab_size"], path))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: does not tell the size of a vocabulary") from error
