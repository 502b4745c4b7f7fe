"""What models of equal size learn from the same bytes of a text."""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.token_file import TokenWriter
from ..errors import InputError, count
from ..progress import Progress
from ..train.config import Config, from_dict
from ..train.trainer import Trainer
from .equal_models import build_model
from .plan import Plan

HELD_OUT = 20  # the last part of so many is not trained on
# folders of the standard library that are no part of it, test it, or hold tables
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class Learning(NamedTuple):
    """
    tokens: [S], read after each step.
    bits: [S] by model, for a byte of the text of that step, which is new to the model.
    held_out: by model, bits for a byte of the text's end, after the last step.
    seconds: by model, of all steps.
    """

    tokens: NDArray[Any]
    bits: dict[str, NDArray[Any]]
    held_out: dict[str, float]
    seconds: dict[str, float]


def compare_learning(
    plan: Plan, configs: dict[str, Any], text: bytes, folder: Path, progress: Progress | None = None
) -> Learning:
    """Trains all models on the same windows of a text, a step each in turn, with the same optimizer and schedule.

    Args:
        text: of which the last part is held out, see `check_text`.
        folder: an empty one, for the token files.
    """
    files = _write_tokens(text, folder)
    trainers = {
        name: Trainer(_settings(plan, files, folder / name), quiet=True, model=build_model(name, config))
        for name, config in configs.items()
    }
    bits: dict[str, list[float]] = {name: [] for name in configs}
    seconds = dict.fromkeys(configs, 0.0)
    for step in range(plan.steps):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            loss = trainer.train_step().loss
            seconds[name] += time.perf_counter() - began
            assert loss is not None
            bits[name].append(loss / math.log(2))
        if progress is not None:
            progress(step + 1, plan.steps)
    return Learning(
        np.arange(1, plan.steps + 1) * plan.batch * plan.context,
        {name: np.array(x) for name, x in bits.items()},
        {name: trainer.evaluate()["eval_loss"] / math.log(2) for name, trainer in trainers.items()},
        seconds,
    )


def _write_tokens(text: bytes, folder: Path) -> dict[str, Path]:
    """Token files of the beginning of a text and of its end."""
    cut = len(text) - len(text) // HELD_OUT
    files = {}
    for name, part in (("train", text[:cut]), ("eval", text[cut:])):
        files[name] = folder / name
        writer = TokenWriter(files[name], "uint8")
        writer.write(np.frombuffer(part, np.uint8))
        writer.finish({})
    return files


def _settings(plan: Plan, files: dict[str, Path], out: Path) -> Config:
    return from_dict(
        {
            "data": {name: str(file) for name, file in files.items()} | {"ctx_len": plan.context, "order": "random"},
            "optim": {"lr": plan.lr, "lr_final": plan.lr / 20, "warmup": max(1, plan.steps // 12)},
            "run": {"out": str(out), "batch": plan.batch, "steps": plan.steps, "precision": "float32"}
            | {"device": "cpu", "eval_rows": plan.eval_rows},
        }
    )


def check_text(text: bytes, plan: Plan, name: object) -> bytes:
    """InputError unless the part that is held out is longer than a text of the training."""
    least = HELD_OUT * (plan.context + 1)
    if len(text) < least:
        raise InputError(f"{name}: {count(len(text), 'byte')} are too few to train on; give a text of {least:,}")
    return text


def standard_library() -> bytes:
    """The source files of Python's standard library one after the other, in the order of their names.

    Raises:
        InputError: they are not installed as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [name for name in sorted(files) if not LEFT_OUT.intersection(name.split("/"))]
    if not names:
        raise InputError(f"{root}: holds no sources of the standard library; give a text with --text")
    return b"".join(files[name].read_bytes() for name in names)
