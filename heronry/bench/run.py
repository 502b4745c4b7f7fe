"""This project beside its peers on the machine at hand: `heronry bench`.

Every contestant has a process of its own and as many threads as there are physical cores. Blocks of all of them
alternate; medians are told, and ratios are medians over neighbouring blocks. What bounds the machine is measured
among them and at the size in question: a share of 80% means that the same bytes could be read, or the same products
computed, in 80% of the time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import InputError
from .contest import Contest, Outcome, run
from .machine import cores, description
from .table import show
from .topics import TOPICS


def bench(
    topics: Sequence[str] = (),
    blocks: int | None = None,
    quick: bool = False,
    large: bool = False,
    out: Path | None = None,
) -> None:
    """Prints a table for each contest as soon as it is over; Ctrl-C prints what there is.

    topics: some of TOPICS; all of them without it.
    blocks: that count, of each contestant; each topic knows how many it needs.
    quick: three blocks and the smaller models only. large: a model of 1.5B too.
    out: a file for the same figures as JSON.
    """
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise InputError(f"there is no topic {unknown[0]!r}; choose from {', '.join(TOPICS)}")
    if blocks is not None and blocks < 1:
        raise InputError(f"blocks must be at least 1, got {blocks}")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out}: no such folder")
    contests = [contest for topic in topics or TOPICS for contest in TOPICS[topic](quick, large)]
    measure(contests, blocks or (3 if quick else None), out)


def measure(contests: Sequence[Contest], blocks: int | None = None, out: Path | None = None) -> dict[str, Any]:
    """Runs the contests and prints them; the figures, as they are in `out`."""
    os.environ["OMP_NUM_THREADS"] = str(cores())  # for the processes to come
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no edge
    machine = description()
    figures: dict[str, Any] = {"machine": machine, "contests": []}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    with tempfile.TemporaryDirectory(prefix="heronry-bench-") as folder, progress.status("") as status:
        for contest in contests:
            outcome = Outcome(contest)
            try:
                run(outcome, blocks or contest.blocks, Path(folder), status.update)
            except KeyboardInterrupt:
                progress.print("stopped; this is what there is")
                contests = []
            show(outcome, console)
            figures["contests"].append(outcome.record())
            if out is not None:
                out.write_text(json.dumps(figures, indent=2) + "\n")
            if not contests:
                break
    return figures
