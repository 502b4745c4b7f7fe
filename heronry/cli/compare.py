"""`heronry compare`: RWKV beside LSTM, GPT and AFT of the same size, as one page."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..files import check_writable
from . import options


def compare(
    text: Annotated[
        Path | None,
        typer.Option(help="A file to learn from.", show_default="the sources of Python's standard library"),
    ] = None,
    out: Annotated[Path, typer.Option(help="An .html file.")] = Path("compare.html"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models, a minute.")] = False,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            envvar="HERONRY_THREADS",
            help="Threads of the CPU; models this small gain little from more.",
        ),
    ] = 1,
    force: options.Force = False,
) -> None:
    """Compare RWKV with LSTM, GPT and AFT of the same size. See docs/compare.md."""
    out = options.check_target(out, force)
    from ..view.figures import new_figure
    from ..view.page import check_ending, write_pictures
    from .progress import note, progress_bar

    if check_ending(out) != ".html":
        raise InputError(f"{out}: a comparison is an .html page")
    new_figure(1, 1)  # says at once if matplotlib is missing
    check_writable(out)  # not after minutes
    try:
        from ..bench.comparison import compare, describe, pictures, table
        from ..bench.learning import check_text, standard_library
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise InputError(f"comparing needs {package}: pip install 'heronry[train,plots]'") from error
    from ..bench.plan import QUICK, Plan
    from ..data.text_files import read_text

    plan = QUICK if quick else Plan()
    name = f"the standard library of Python {platform.python_version()}" if text is None else str(text)
    content = check_text(standard_library() if text is None else read_text(text).encode(), plan, name)
    options.use_threads(threads)
    with progress_bar("comparing") as update:
        found = compare(plan, content, name, lambda part: lambda done, total: update(done, total, part))
    write_pictures(
        pictures(found), out, "RWKV beside LSTM, GPT and AFT", describe(found), table(found), found.figures()
    )
    slowest = max(value for name, value in found.decoding.slowdown.items() if name.startswith("RWKV"))
    note(
        f"{out}: at position {plan.positions[-1]:,} a token takes RWKV at most {slowest:.2f} times as long as at "
        f"{plan.positions[0]:,}, GPT {found.decoding.slowdown['GPT']:.2f} times"
    )
