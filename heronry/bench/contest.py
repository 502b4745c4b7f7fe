"""Times contestants side by side: their blocks alternate, so that other load on the machine affects all of them."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import CheckpointWriter, Shape
from .worker import Contestant, ContestantError, Worker

WARM_UP_BLOCKS = 2  # run before those that count
PAUSE = 0.03  # seconds between blocks; idle OpenMP threads spin for a while before they sleep


@dataclass(frozen=True)
class Row:
    """What one contestant does in a block, and what it is compared with.

    Attributes:
        job: the contestant's method that makes the job; "load" starts a new process for each block and counts only the
            time to load the weights.
        options: arguments of that method.
        file: shape and kind of a checkpoint (see shapes.CheckpointWriter), passed to the contestant before its options.
        units: how many tokens, or other units of the contest, one block processes.
        cost: bytes read or operations done in a block. With a `limit`, the share of that row's best rate is reported;
            without one the row is a limit itself.
        limit: the name of the row that bounds this one.
        against: names of rows that the speed is compared with.
        part_of: the name of the row that includes this one's work.
        weights: bytes of the weights; the memory beyond them is reported.
    """

    name: str
    contestant: Contestant
    job: str
    options: tuple[Any, ...] = ()
    file: tuple[Shape, str] | None = None
    units: int = 1
    cost: int = 0
    limit: str = ""
    against: tuple[str, ...] = ()
    part_of: str = ""
    weights: int = 0

    @property
    def process_key(self) -> Hashable:
        """Rows with the same key share a process."""
        return self.contestant, self.file

    def contestant_in(self, folder: Path) -> Contestant:
        """The contestant with the path of its file, which lies in `folder`, before its options."""
        if self.file is None:
            return self.contestant
        shape, kind = self.file
        return self.contestant._replace(options=(shape.path(kind, folder), *self.contestant.options))

    @property
    def missing_package(self) -> str:
        """How to install the package that this row needs; "" if it is installed."""
        module = getattr(self.contestant.kind, "module", None)
        if module is None or importlib.util.find_spec(module) is not None:
            return ""
        return f"not installed: pip install {getattr(self.contestant.kind, 'package', module)}"


@dataclass(frozen=True)
class Contest:
    """Rows that are timed together.

    Attributes:
        unit: what `Row.units` counts: "token", "pass", ...
        blocks: how many blocks of each row count.
        memory: whether memory and load time are reported too.
    """

    topic: str
    title: str
    unit: str
    rows: list[Row]
    blocks: int = 15
    memory: bool = False


@dataclass
class Result:
    """What was measured of a row.

    Attributes:
        seconds: the time of each block that counts.
        problem: why there are no blocks, or no further ones.
        load_seconds: the time to load the weights.
        memory: bytes: "resident", "anonymous" and "peak".
    """

    row: Row
    seconds: list[float] = field(default_factory=list)
    problem: str = ""
    load_seconds: float | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds of a block."""
        return statistics.median(self.seconds)


class Outcome:
    """The results of a contest so far; complete unless it was interrupted."""

    def __init__(self, contest: Contest):
        self.contest = contest
        self.results = {row.name: Result(row) for row in contest.rows}

    def limit_share(self, result: Result) -> float | None:
        """The median rate as a fraction of the rate in the best block of its limit."""
        limit = self.results.get(result.row.limit)
        if limit is None or not limit.seconds or not result.seconds:
            return None
        return result.row.cost / limit.row.cost * min(limit.seconds) / result.median

    def speed_ratio(self, result: Result, name: str) -> float | None:
        """How many times as fast as the row `name`: the median over pairs of neighbouring blocks."""
        other = self.results.get(name)
        if other is None or not other.seconds or not result.seconds:
            return None
        pairs = zip(result.seconds, other.seconds, strict=False)
        return statistics.median(b / a * result.row.units / other.row.units for a, b in pairs)

    def figures(self) -> dict[str, Any]:
        """The whole contest for JSON."""
        return {
            "topic": self.contest.topic,
            "title": self.contest.title,
            "unit": self.contest.unit,
            "rows": [self.row_figures(result) for result in self.results.values()],
        }

    def row_figures(self, result: Result) -> dict[str, Any]:
        """One row for JSON and for the table; keys without a figure are left out."""
        row = result.row
        figures: dict[str, Any] = {"name": row.name}
        if result.problem:
            figures["problem"] = result.problem
        if result.seconds:
            seconds = result.median / row.units
            figures |= {
                "ms": 1000 * seconds,
                "per_second": 1 / seconds,
                "blocks": result.seconds,
                "units": row.units,
            }
        if row.cost:
            figures["cost"] = row.cost
        if row.cost and not row.limit and result.seconds:
            figures["best_per_second"] = row.cost / min(result.seconds)
        if row.limit:
            figures |= {"limit": row.limit, "share": self.limit_share(result)}
        if row.against:
            figures["times_as_fast_as"] = {name: self.speed_ratio(result, name) for name in row.against}
        if row.part_of:
            ratio = self.speed_ratio(result, row.part_of)
            figures |= {"part_of": row.part_of, "part": ratio and 1 / ratio}
        if result.load_seconds is not None:
            figures["load_seconds"] = result.load_seconds
        figures |= {f"{name}_bytes": size for name, size in result.memory.items()}
        if row.weights and result.memory:
            figures["beyond_weights_bytes"] = result.memory["resident"] - row.weights
        return figures


def run_contest(outcome: Outcome, blocks: int, folder: Path, report: Callable[[str], None]) -> None:
    """Fill in the outcome of its contest, which holds the results so far if this is interrupted.

    Args:
        blocks: how many blocks of each row count.
        folder: where checkpoints are written, unless they exist already.
        report: called with a line about what is happening.
    """
    title, results = outcome.contest.title, outcome.results.values()
    workers: dict[Hashable, Worker] = {}
    try:
        for result in results:
            row, result.problem = result.row, result.row.missing_package
            report(f"{title}: loading {row.name}")
            with _recorded_failure(result):
                if not result.problem and row.file:
                    _write_checkpoint(*row.file, folder)
                if not result.problem and row.job != "load" and row.process_key not in workers:
                    workers[row.process_key] = Worker(row.contestant_in(folder))
        for block in range(-WARM_UP_BLOCKS, blocks):
            for result in results:
                if result.problem or (block < 0 and result.row.job == "load"):  # each load is a first one
                    continue
                phase = f"block {block + 1} of {blocks}" if block >= 0 else "warming up"
                report(f"{title}: {phase}, {result.row.name}")
                time.sleep(PAUSE)
                with _recorded_failure(result):
                    seconds = _time_block(result, workers, folder)
                    if block >= 0:
                        result.seconds.append(seconds)
    finally:
        for worker in workers.values():
            worker.stop()


@contextmanager
def _recorded_failure(result: Result) -> Iterator[None]:
    """Records the failure of a contestant in its result, so that the others continue."""
    try:
        yield
    except ContestantError as error:
        result.problem = str(error)


def _write_checkpoint(shape: Shape, kind: str, folder: Path) -> None:
    if not shape.path(kind, folder).exists():
        Worker(Contestant(CheckpointWriter, (shape, kind, folder))).stop()


def _time_block(result: Result, workers: dict[Hashable, Worker], folder: Path) -> float:
    """Run one block of the row; returns its seconds, and updates load time and memory in `result`."""
    row = result.row
    loads = row.job == "load"
    worker = Worker(row.contestant_in(folder)) if loads else workers[row.process_key]
    seconds = worker.load_seconds if loads else worker.run(row.job, row.options)
    result.load_seconds, result.memory = worker.load_seconds, worker.memory()
    if loads:
        worker.stop()
    return seconds
