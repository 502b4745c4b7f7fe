"""Metrics of a training run: a line of JSON every few steps, TensorBoard, wandb, and a progress bar.

The logger knows no trainer: it is given plain values.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from ..errors import InputError
from ..files import atomic_write
from ..text.terminal import printable


@dataclass(frozen=True)
class RunInfo:
    """What does not change during a run."""

    out: Path  # the folder of log.jsonl
    description: str  # the first line on the console
    unit: str  # what is counted: "token" or "image"
    steps: int  # in the whole run
    log_every: int  # steps
    eval_data: str
    wandb: str  # the project, or ""
    flops_per_unit: int  # forward and backward
    device: torch.device
    precision: str
    processes: int


@dataclass(frozen=True)
class Progression:
    """How far a run is."""

    step: int = 0  # completed steps
    units: int = 0  # tokens or images read
    seconds: float = 0.0  # spent in steps


class Sink(Protocol):
    """Where rows of metrics go. A row has "step", numbers, and perhaps the text "sample"."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """A `Sink`: files for TensorBoard."""

    def __init__(self, info: RunInfo, step: int):
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        self._writer = SummaryWriter(str(info.out / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for key, x in _numbers(row).items():
            self._writer.add_scalar(key, x, row["step"])
        if "sample" in row:
            self._writer.add_text("sample", row["sample"], row["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A `Sink`: a run of wandb, which a resumed run continues."""

    def __init__(self, info: RunInfo, step: int):
        import wandb  # an optional package

        file = info.out / "wandb_id"  # not made of names of folders, which other runs may have too
        if not step or not file.is_file():
            with atomic_write(file) as part:
                part.write_text(secrets.token_hex(8))
        try:
            self._run = wandb.init(project=info.wandb, dir=info.out, resume="allow", id=file.read_text())
        except Exception as error:  # no key, no network
            raise InputError(f"run.wandb: {' '.join(str(error).split())}") from error

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(row: dict[str, Any]) -> dict[str, int | float]:
    return {key: x for key, x in row.items() if isinstance(x, int | float) and key != "step"}


class MetricsLogger:
    """Logs one run; used as a context manager.

    Attributes:
        nats, n_counted: the losses since the last line of the log, summed over all predictions that count, and how
            many these are.
    """

    def __init__(self, info: RunInfo, start: Progression, unlogged: tuple[float, int], quiet: bool):
        """
        Args:
            start: where the run starts or resumes.
            unlogged: nats and n_counted of the steps before `start` that no line of the log covers.
            quiet: write and print nothing.

        Raises:
            InputError: wandb is wanted, but not installed.
        """
        self.info, self.start, self.quiet = info, start, quiet
        self.nats, self.n_counted = unlogged
        self._last = start  # at the last line
        self._file = info.out / "log.jsonl"
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._bar_task = TaskID(0)
        self._status = self._evaluation = ""  # what the bar says of the last line and the last evaluation
        self._peak_flops = math.inf  # of one process, per second
        self._sinks: dict[str, Sink] = {}  # where rows go besides the file
        if info.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("run.wandb is set, but wandb is not installed: pip install wandb")

    def __enter__(self) -> MetricsLogger:
        if self.quiet:
            return self
        info, step = self.info, self.start.step
        try:
            self._drop_later_lines()
        except OSError as error:
            raise InputError(f"{info.out}: cannot be written ({error.strerror})") from error
        if info.wandb:
            self._sinks["wandb"] = Wandb(info, step)
        self._thread_hook, threading.excepthook = threading.excepthook, self._report_thread
        if importlib.util.find_spec("tensorboard") is not None:
            self._guard("TensorBoard", lambda: self._sinks.update(TensorBoard=TensorBoard(info, step)))
        self.print(info.description)
        if step:
            self.print(f"resuming from step {step}")
        self._peak_flops = peak_matmul_flops(info.device, info.precision)
        columns = (
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(10), TextColumn("elapsed"), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
            TextColumn("{task.description}", table_column=Column()),  # may go on in another line
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._bar_task = self._bar.add_task("", total=info.steps, completed=step)
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)
        if not self.quiet:
            threading.excepthook = self._thread_hook

    def _report_thread(self, args: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread, whose error the next call into it raises."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            self._thread_hook(args)

    def log_step(self, progress: Progression, nats: float, n_counted: int, grad_norm: float, lr: float) -> None:
        """Call this after every step; writes a line every `log_every` steps and after the last one.

        Args:
            progress: after the step.
            nats: the loss of the step, summed over its `n_counted` predictions that count. A step without a finite
                loss and finite gradients is reported at once, and is no part of the mean.
            grad_norm: before clipping.
            lr: the learning rate of the step.
        """
        if math.isfinite(nats) and math.isfinite(grad_norm):
            self.nats += nats
            self.n_counted += n_counted
        else:
            loss = nats / n_counted if n_counted else None
            self.print(f"step {progress.step}: loss {loss}, gradient norm {grad_norm}: step skipped")
        logs = progress.step % self.info.log_every == 0 or progress.step == self.info.steps
        if not logs:
            self._update_bar(progress.step)
            return
        unit = self.info.unit
        speed = (progress.units - self._last.units) / (progress.seconds - self._last.seconds)
        loss = self.nats / self.n_counted if self.n_counted else None
        row: dict[str, Any] = {"step": progress.step, f"{unit}s": progress.units, "seconds": round(progress.seconds, 3)}
        row |= {"loss": loss, "grad_norm": grad_norm, "lr": lr, f"{unit}s_per_second": round(speed, 1)}
        if self._bar is not None:
            share = speed * self.info.flops_per_unit / (self._peak_flops * self.info.processes)
            row["flops_share"] = round(share, 4)
            loss_text = "none" if loss is None else f"{loss:.4f}"
            self._status = f"loss {loss_text}, {speed:,.0f} {unit}s/s"
            self._update_bar(progress.step)
        self._last = progress
        self.nats, self.n_counted = 0.0, 0
        self._write(row)

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """metrics: "eval_loss" in nats (nan: no token counts), and for images "eval_accuracy"."""
        text = f"{metrics['eval_loss']:.4f} nats per {self.info.unit}"
        if "eval_accuracy" in metrics:
            text += f", accuracy {metrics['eval_accuracy']:.2%}"
        self.print(f"step {step}: {text} on {self.info.eval_data}")
        self._evaluation = f", evaluation {metrics['eval_loss']:.4f}"
        self._update_bar(step)
        self._write({"step": step, **metrics})

    def log_sample(self, step: int, text: str) -> None:
        """text: what the model has generated."""
        self.print(f"step {step}, sample: {text}")
        self._write({"step": step, "sample": text})

    def print(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if not self.quiet:
            self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def _update_bar(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=step, description=self._status + self._evaluation)

    def _write(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        try:
            append_line(self._file, json.dumps(row))
        except OSError as error:  # the disk is full; the run continues
            self.print(f"step {row['step']} could not be logged: {error}")
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink.write, row))

    def _guard(self, name: str, call: Callable[[], object]) -> None:
        """Calls into a package that logs. If that fails, the run prints a line and goes on without it; what they raise
        is of many kinds: the disk is full, the network is gone."""
        try:
            call()
        except Exception as error:
            self._sinks.pop(name, None)
            self.print(f"{name} gets no more lines: {' '.join(str(error).split()) or type(error).__name__}")

    def _drop_later_lines(self) -> None:
        """Deletes the lines of steps after the checkpoint, which will be repeated."""
        self.info.out.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            return
        lines = []
        for line in self._file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["step"] <= self.start.step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # cut off when the run was killed
                continue
        with atomic_write(self._file) as part:
            part.write_text("".join(lines), encoding="utf-8")


def append_line(file: Path, line: str) -> None:
    """Appends a line or, if there is no space for all of it, nothing.

    Raises:
        OSError: it cannot be written.
    """
    data = (line + "\n").encode()
    with open(file, "ab", buffering=0) as lines:
        size = lines.tell()
        try:
            if lines.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            lines.truncate(size)
            raise


def peak_matmul_flops(device: torch.device, precision: str) -> float:
    """Operations per second in a product of matrices, the best of four measurements."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
