"""Runs the contests of `heronry bench` and prints them.

Every contestant has a process of its own and as many threads as there are physical cores. Blocks of all contestants
alternate; figures are medians, and ratios are medians over neighbouring blocks. The machine's limits are measured among
the contestants and at the size in question: 80% of the limit means that the same bytes could be read, or the same
products computed, in 80% of the time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import InputError, unknown_name
from ..files import atomic_write
from .contest import Contest, Outcome, run_contest
from .machine import describe_machine, physical_cores
from .table import print_table
from .topics import TOPICS


def run_topics(
    topics: Sequence[str] = (),
    blocks: int | None = None,
    quick: bool = False,
    large: bool = False,
    out: Path | None = None,
) -> None:
    """Print a table for each contest as soon as it is over; Ctrl-C prints what there is so far.

    Args:
        topics: some of TOPICS; () for all.
        blocks: how many blocks of each contestant count; None for the number that each contest needs.
        quick: three blocks, and the smaller models only.
        large: a model of 1.5B parameters too.
        out: a file to write the figures to as JSON.
    """
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise unknown_name("topic", unknown[0], TOPICS)
    if blocks is not None and blocks < 1:
        raise InputError(f"blocks must be at least 1, got {blocks}")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out}: no such folder")
    contests = [contest for topic in topics or TOPICS for contest in TOPICS[topic](quick, large)]
    run_contests(contests, blocks or (3 if quick else None), out)


def run_contests(contests: Sequence[Contest], blocks: int | None = None, out: Path | None = None) -> dict[str, Any]:
    """Run the contests and print them; returns the figures as they are in `out`."""
    os.environ["OMP_NUM_THREADS"] = str(physical_cores())  # inherited by the workers
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width
    machine = describe_machine()
    figures: dict[str, Any] = {"machine": machine, "contests": []}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    with tempfile.TemporaryDirectory(prefix="heronry-bench-") as folder, progress.status("") as status:
        for contest in contests:
            outcome = Outcome(contest)
            interrupted = False
            try:
                run_contest(outcome, blocks or contest.blocks, Path(folder), status.update)
            except KeyboardInterrupt:
                progress.print("stopped; these are the results so far")
                interrupted = True
            print_table(outcome, console)
            figures["contests"].append(outcome.figures())
            if out is not None:
                with atomic_write(out) as part:
                    part.write_text(json.dumps(figures, indent=2) + "\n")
            if interrupted:
                break
    return figures
