"""`heronry data`: texts on one side, a token file on the other."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.sources import find
from ..data.tokenize_corpus import Standing, prepare
from ..errors import InputError
from ..text.chat_templates import TEMPLATES
from ..text.conversations import Dialogue
from ..text.tokenizers import guess, load_tokenizer

MOST_WORKERS = min(8, os.cpu_count() or 1)  # beyond that the process that reads cannot keep up


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
