"""`heronry bench`: this package timed beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    topics: Annotated[
        list[str] | None,
        typer.Argument(
            help="machine, decode, fixed, prefill, batch, load, train, operators, vision.", show_default="all"
        ),
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Blocks to time of each contestant.", show_default="by topic")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three blocks, smaller models only.")] = False,
    large: Annotated[bool, typer.Option("--large", help="Also a model of 1.5B parameters.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
) -> None:
    """Time this package beside its peers. The extra `bench` installs the peers."""
    from ..bench.run import run_topics

    run_topics(topics or (), blocks, quick, large, out)
