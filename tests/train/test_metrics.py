"""What is logged, where, and that nothing which cannot be written ends a run."""

from __future__ import annotations

import errno
import importlib.machinery
import json
import math
import os
import resource
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from heronry.errors import InputError
from heronry.train.metrics import MetricsLogger, Progression, RunInfo, append_line


def info(out: Path, **changes) -> RunInfo:
    fixed = {"description": "a run", "unit": "token", "steps": 3, "log_every": 1, "eval_data": "texts", "wandb": ""}
    fixed |= {"flops_per_unit": 1, "device": torch.device("cpu"), "precision": "float32", "processes": 1}
    return RunInfo(out=out, **fixed | changes)


def log_run(out: Path, start: int = 0, **changes) -> list[dict]:
    with MetricsLogger(info(out, **changes), Progression(start), (0.0, 0), quiet=False) as logger:
        for step in range(start + 1, 4):
            logger.log_step(Progression(step, 10 * step, float(step)), 2.0, step, 1.0, 1e-3)
        logger.log_evaluation(3, {"eval_loss": 1.5})
        logger.log_sample(3, "A heron\u2028stands")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().split("\n") if line]


def test_rows(tmp_path):
    rows = log_run(tmp_path)
    assert [(row["step"], row.get("loss"), row.get("eval_loss"), row.get("sample")) for row in rows] == [
        (1, 2.0, None, None),
        (2, 1.0, None, None),
        (3, 2.0 / 3, None, None),
        (3, None, 1.5, None),
        (3, None, None, "A heron\u2028stands"),
    ]
    assert log_run(tmp_path, start=2)[:2] == rows[:2]  # what comes after the checkpoint is logged again


def test_the_mean_is_over_what_counts_in_steps_that_were_not_skipped(tmp_path):
    with MetricsLogger(info(tmp_path, log_every=4, steps=4), Progression(), (0.0, 0), quiet=False) as logger:
        steps = [(6.0, 2, 1.0), (0.0, 0, 0.0), (math.nan, 5, math.nan), (9.0, 1, 1.0)]
        for step, (nats, n_counted, norm) in enumerate(steps, 1):
            logger.log_step(Progression(step, step, step), nats, n_counted, norm, 1e-3)
        logger.log_evaluation(4, {"eval_loss": math.nan})
    row, evaluation = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert row["loss"] == 15 / 3
    assert evaluation == {"step": 4, "eval_loss": None}  # JSON knows no nan


@pytest.mark.parametrize("fails", ["__init__", "add_scalar", "close"])
def test_tensorboard_that_cannot_write_ends_no_run(fails, tmp_path, monkeypatch, capfd):
    from torch.utils import tensorboard

    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorboard.SummaryWriter, fails, fail)
    hook = threading.excepthook
    assert len(log_run(tmp_path)) == 5
    assert threading.excepthook is hook
    lines = [line for line in capfd.readouterr().err.splitlines() if "TensorBoard" in line]
    assert lines == ["TensorBoard gets no more lines: [Errno 28] No space left on device"]


class FakeWandb(types.ModuleType):
    def __init__(self, refuses: str = ""):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.ids, self.refuses = [], refuses

    def init(self, id: str, **options: object) -> FakeWandb:
        self.ids.append(id)
        if self.refuses == "init":
            raise RuntimeError("no API key\nrun wandb login")
        return self

    def log(self, row: dict, step: int) -> None:
        if self.refuses == "log":
            raise ConnectionError("gone")

    def finish(self) -> None:
        pass


def test_every_run_has_its_own_id_in_wandb(tmp_path, monkeypatch, capfd):
    """Also those in folders of the same names; a run that is resumed keeps it."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder, start in (("a/runs/out", 0), ("b/runs/out", 0), ("a/runs/out", 1)):
        log_run(tmp_path / folder, start, wandb="project")
    assert len(set(fake.ids)) == 2
    assert fake.ids[2] == fake.ids[0]
    fake.refuses = "log"
    assert len(log_run(tmp_path / "c", wandb="project")) == 5
    assert capfd.readouterr().err.count("wandb gets no more lines: gone\n") == 1
    fake.refuses = "init"
    with pytest.raises(InputError, match=r"^run\.wandb: no API key run wandb login$"):
        log_run(tmp_path / "d", wandb="project")


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "log.jsonl"
    append_line(file, "x" * 50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match=r"File too large|No space left"):
                append_line(file, "y" * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    append_line(file, "z")
    assert file.read_text() == "x" * 50 + "\nz\n"
