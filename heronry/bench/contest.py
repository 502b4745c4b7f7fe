"""Contestants side by side: blocks of all of them alternate, so that whatever else the machine does meets each."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .shapes import Maker, Shape
from .worker import Contestant, Failed, Worker

WARM = 2  # blocks in front that do not count
PAUSE = 0.03  # seconds; idle threads of OpenMP spin for a while before they sleep


@dataclass(frozen=True)
class Row:
    """What one contestant does in a block, and what to compare it with.

    job: the method that gives it; "load" takes a new process for each block and counts its load alone.
    file: the shape and kind of a file (see shapes.Maker) that the contestant is given in front of its options.
    units: tokens, or whatever speed is told in, of a block.
    cost: bytes or operations of a block; their share of what the row `limit` reached is told. A row with a cost and
        no limit is a limit itself.
    against: the rows that this one is measured by.
    part_of: the row whose work this one does a part of.
    weights: bytes; what memory holds beyond them is told.
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
    def key(self) -> Any:
        """Rows with the same key share a process."""
        return self.contestant, self.file

    def given(self, folder: Path) -> Contestant:
        """The contestant with its file."""
        if self.file is None:
            return self.contestant
        shape, kind = self.file
        return self.contestant._replace(options=(shape.path(kind, folder), *self.contestant.options))

    @property
    def missing(self) -> str:
        """How to install what this row needs and what is not there."""
        module = getattr(self.contestant.kind, "module", None)
        if module is None or importlib.util.find_spec(module) is not None:
            return ""
        return f"not installed: pip install {self.contestant.kind.package}"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Contest:
    topic: str
    title: str
    unit: str  # of `units`: "token", "pass"
    rows: list[Row]
    blocks: int = 15
    memory: bool = False  # whether memory and load are part of the question


@dataclass
class Result:
    """seconds: of each block that counts. problem: why there are none, or no more."""

    row: Row
    seconds: list[float] = field(default_factory=list)
    problem: str = ""
    load_seconds: float | None = None
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Outcome:
    """What a contest gave, also when it was cut short."""

    def __init__(self, contest: Contest):
        self.contest = contest
        self.results = {row.name: Result(row) for row in contest.rows}

    def share(self, result: Result) -> float | None:
        """Of the limit, whose best block counts."""
        limit = self.results.get(result.row.limit)
        if limit is None or not limit.seconds or not result.seconds:
            return None
        return result.row.cost / limit.row.cost * min(limit.seconds) / result.median

    def ratio(self, result: Result, name: str) -> float | None:
        """How many times as fast as another row: the median over pairs of neighbouring blocks."""
        other = self.results.get(name)
        if other is None or not other.seconds or not result.seconds:
            return None
        pairs = zip(result.seconds, other.seconds, strict=False)
        return statistics.median(b / a * result.row.units / other.row.units for a, b in pairs)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "topic": self.contest.topic,
            "title": self.contest.title,
            "unit": self.contest.unit,
            "rows": [self.describe(result) for result in self.results.values()],
        }

    def describe(self, result: Result) -> dict[str, Any]:
        """One row of it."""
        row = result.row
        told: dict[str, Any] = {"name": row.name}
        if result.problem:
            told["problem"] = result.problem
        if result.seconds:
            each = result.median / row.units
            told |= {"ms": 1000 * each, "per_second": 1 / each, "blocks": result.seconds, "units": row.units}
        if row.cost:
            told["cost"] = row.cost
        if row.cost and not row.limit and result.seconds:
            told["best_per_second"] = row.cost / min(result.seconds)
        if row.limit:
            told |= {"limit": row.limit, "share": self.share(result)}
        if row.against:
            told["times_as_fast_as"] = {name: self.ratio(result, name) for name in row.against}
        if row.part_of:
            ratio = self.ratio(result, row.part_of)
            told |= {"part_of": row.part_of, "part": ratio and 1 / ratio}
        if result.load_seconds is not None:
            told["load_seconds"] = result.load_seconds
        told |= {f"{name}_bytes": size for name, size in result.memory.items()}
        if row.weights and result.memory:
            told["beyond_weights_bytes"] = result.memory["resident"] - row.weights
        return told


def run(outcome: Outcome, blocks: int, folder: Path, tell: Callable[[str], None]) -> None:
    """Fills in the outcome of its contest, which holds what there is when this is interrupted.

    folder: where files are made or found. tell: hears what happens now.
    """
    title, results = outcome.contest.title, outcome.results.values()
    workers: dict[Any, Worker] = {}
    try:
        for result in results:
            row, result.problem = result.row, result.row.missing
            tell(f"{title}: loading {row.name}")
            with _told(result):
                if not result.problem and row.file:
                    _make(*row.file, folder)
                if not result.problem and row.job != "load" and row.key not in workers:
                    workers[row.key] = Worker(row.given(folder))
        for block in range(-WARM, blocks):
            for result in results:
                if result.problem or (block < 0 and result.row.job == "load"):  # which is always a first time
                    continue
                where = f"block {block + 1} of {blocks}" if block >= 0 else "warming up"
                tell(f"{title}: {where}, {result.row.name}")
                time.sleep(PAUSE)
                with _told(result):
                    seconds = _block(result, workers, folder)
                    if block >= 0:
                        result.seconds.append(seconds)
    finally:
        for worker in workers.values():
            worker.stop()


@contextmanager
def _told(result: Result) -> Iterator[None]:
    """A contestant that fails is out, the others go on."""
    try:
        yield
    except Failed as error:
        result.problem = str(error)


def _make(shape: Shape, kind: str, folder: Path) -> None:
    if not shape.path(kind, folder).exists():
        Worker(Contestant(Maker, (shape, kind, folder))).stop()


def _block(result: Result, workers: dict[Any, Worker], folder: Path) -> float:
    row = result.row
    fresh = row.job == "load"
    worker = Worker(row.given(folder)) if fresh else workers[row.key]
    seconds = worker.load_seconds if fresh else worker.run(row.job, row.options)
    result.load_seconds, result.memory = worker.load_seconds, worker.memory()
    if fresh:
        worker.stop()
    return seconds
