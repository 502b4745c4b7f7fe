"""`heronry data`: texts in, a token file out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from ..catalog import BUNDLED
from ..errors import InputError, count
from . import options
from .signals import Terminated

MOST_WORKERS = min(8, os.cpu_count() or 1)  # with more, the process that reads cannot keep up


def data(
    sources: Annotated[
        list[str],
        typer.Argument(
            help=".txt, .jsonl, .json (also .gz, .bz2, .xz, .zst), .parquet, folders, globs, or hf://NAME[:SPLIT]."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PREFIX", help="The token file, without its endings.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="bytes, world, bundled, a tokenizer.json, or a model's folder.")
    ] = "world",
    template: options.DataTemplate = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="one a core, at most 8")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Encode on a Ray cluster: HOST:PORT, auto for the one of this machine, local for a new one.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="The field of a row that holds its text.", show_default="told by the names of the fields"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="What a row is, if it could be several: text, messages, sharegpt, alpaca, prompt-completion, "
            "question-answer or chosen."
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read, and count.")
    ] = False,
    holdout: Annotated[float, typer.Option(help="This fraction of the documents goes to PREFIX-eval.")] = 0.0,
    restart: Annotated[bool, typer.Option("--restart", help="Start again and overwrite what exists.")] = False,
) -> None:
    """Turn texts into a token file to train on. If interrupted, the same command continues. See docs/data.md."""
    import time

    from ..data import tokenize_corpus as corpus
    from ..data.sources import find_sources
    from ..data.token_file import strip_suffix
    from ..files import naming
    from ..text.template_choice import read_folder
    from .progress import note, progress_bar

    def describe(documents: int, tokens: int) -> str:
        return f"{count(documents, 'document')}, {count(tokens, 'token')}"

    tokenizer_spec = _tokenizer_spec(tokenizer)
    own = read_folder(Path(tokenizer).expanduser()) if template is None else None
    if own is not None:
        template = own.text
    sizes = [source.size for source in find_sources(sources)]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    start = time.monotonic()
    first: corpus.Progress | None = None  # what an earlier run has done does not count for the speed
    bytes_read = 0
    try:
        with naming(out), progress_bar("", in_bytes=True) as update:

            def show_progress(n_bytes: int, done: corpus.Progress) -> None:
                nonlocal first, bytes_read
                first, bytes_read = first or done, n_bytes
                update(n_bytes, total, describe(done.documents, done.tokens))

            result = corpus.tokenize_corpus(
                sources,
                out,
                tokenizer_spec,
                key=key,
                shape=shape,
                skip_bad=skip_bad,
                template=template,
                holdout=holdout,
                workers=MOST_WORKERS if workers is None and cluster is None else workers,
                cluster=cluster,
                restart=restart,
                on_progress=show_progress,
            )
    except KeyboardInterrupt:
        raise Terminated(signal.SIGINT, "stopped; the same command continues from here") from None
    speed = (result.tokens - (first or result).tokens) / (time.monotonic() - start)
    line = f"{describe(result.documents, result.tokens)} of {count(bytes_read, 'byte')} on disk, {speed:,.0f} tokens/s"
    if holdout:
        line += f"; {describe(result.held_out.documents, result.held_out.tokens)} held out"
    note(f"{strip_suffix(out)}: {line}")
    if result.skipped.rows:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in result.skipped.reasons.items())
        note(f"skipped {count(result.skipped.rows, 'bad row')}: {reasons}; the first:")
        for row in result.skipped.first:
            note(f"  {row}")


def _tokenizer_spec(name: str) -> str:
    """What load_tokenizer takes: "bytes", "world" or the path of a tokenizer.json; `name` may also be the folder of a
    model, which holds that file or whose vocabulary size decides, or "bundled"."""
    import json

    from ..text.tokenizers import guess_tokenizer

    if not name:
        raise InputError("the name of a tokenizer must not be empty")
    path = BUNDLED if name == "bundled" else Path(name).expanduser()
    if name in ("bytes", "world"):
        return name
    if not path.is_dir():
        return str(path)
    config = path / "config.json"
    if not config.is_file():
        return str(path / "tokenizer.json")
    try:
        vocab_size = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config}: not a JSON object with a vocab_size") from error
    return str(guess_tokenizer(vocab_size, path))
