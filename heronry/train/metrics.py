"""What a run tells: a line of JSON every few steps, TensorBoard, wandb, and a bar with the time that is left."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import InputError
from ..files import atomic_write

if TYPE_CHECKING:
    from .trainer import Run


class Journal:
    """Of one run; a quiet one keeps the losses and tells nobody."""

    def __init__(self, run: Run, quiet: bool):
        self.run, self.quiet = run, quiet
        self.file = run.out / "log.jsonl"
        self.waiting: list[float] = run.waiting  # the losses since the last line
        self.since = (run.tokens, run.seconds)
        self.speed = f"{run.passes.unit}s_per_second"
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.board: Any = None
        self.wandb: Any = None
        if run.config.run.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("run.wandb is set, but wandb is not installed: pip install wandb")

    def __enter__(self) -> Journal:
        if self.quiet:
            return self
        run = self.run
        self._forget_what_is_lost()
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1)
        if run.config.run.wandb:
            import wandb

            self.wandb = wandb.init(project=run.config.run.wandb, dir=run.out, resume="allow", id=_name(run.out))
        parameters = run.plain.num_parameters(only_trainable=True)
        self.say(
            f"{run.plain.name}: {parameters / 1e6:.1f} M parameters to train, {run.passes.told()}, "
            f"{run.steps} steps of {run.passes.a_step}"
        )
        if run.step:
            self.say(f"going on from step {run.step}")
        self.peak = matrix_peak(run.accelerator.device, run.precision)
        self.flops = run.passes.flops(run.plain)
        columns = (TextColumn("{task.fields[told]}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console)
        self.task = self.bar.add_task("", total=run.steps, completed=run.step, told="")
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def step(self, loss: float, norm: float) -> None:
        """After every step. A step without finite gradients is told of at once, and its loss left out."""
        run = self.run
        if math.isfinite(loss) and math.isfinite(norm):
            self.waiting.append(loss)
        else:
            self.say(f"step {run.step}: loss {loss}, gradients {norm}: the weights stay what they were")
        if run.step % run.config.run.log_every and run.step != run.steps:
            return
        tokens, seconds = run.tokens - self.since[0], run.seconds - self.since[1]
        row: dict[str, Any] = {"step": run.step, f"{run.passes.unit}s": run.tokens, "seconds": round(run.seconds, 3)}
        row |= {"loss": sum(self.waiting) / len(self.waiting) if self.waiting else None, "grad_norm": norm}
        row |= {"lr": run.optimizer.param_groups[0]["lr"], self.speed: round(tokens / seconds, 1)}
        if not self.quiet:
            row["flops_share"] = round(tokens / seconds * self.flops / (self.peak * run.accelerator.num_processes), 4)
            loss_told = f"{row['loss']:.4f}" if self.waiting else "none"
            told = f"loss {loss_told}  {row[self.speed]:,.0f} {run.passes.unit}s/s  {row['flops_share']:.0%} of peak"
            assert self.bar is not None
            self.bar.update(self.task, completed=run.step, told=told)
        self.since = run.tokens, run.seconds
        self.waiting.clear()
        self._write(row)

    def measure(self, found: dict[str, float]) -> None:
        told = f"step {self.run.step}: {found['eval_loss']:.4f} nats a {self.run.passes.unit}"
        if "eval_accuracy" in found:
            told += f", {found['eval_accuracy']:.2%} right"
        self.say(f"{told} on {self.run.config.data.eval}")
        self._write({"step": self.run.step, **found})

    def text(self, text: str) -> None:
        self.say(f"step {self.run.step} writes: {text}")
        self._write({"step": self.run.step, "sample": text})

    def say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, highlight=False, markup=False)

    def _write(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        try:
            with open(self.file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk; the run goes on
            self.say(f"step {row['step']} is not in the log: {error}")
        numbers = {key: x for key, x in row.items() if isinstance(x, int | float) and key != "step"}
        if self.board:
            for key, x in numbers.items():
                self.board.add_scalar(key, x, row["step"])
            if "sample" in row:
                self.board.add_text("sample", row["sample"], row["step"])
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    def _forget_what_is_lost(self) -> None:
        """Lines of steps after the checkpoint, which will be taken again."""
        self.run.out.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= self.run.step:
                    kept.append(line + "\n")
            except ValueError:  # cut off where the run was killed
                continue
        with atomic_write(self.file) as part:
            part.write_text("".join(kept), encoding="utf-8")


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations a second in a product of matrices, the best of a few."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=getattr(torch, precision))
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _name(folder: Path) -> str:
    return "-".join(folder.resolve().parts[-2:])
