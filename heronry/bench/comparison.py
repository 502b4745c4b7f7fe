"""`heronry compare`: all parts of a comparison, one after the other, and its report."""

from __future__ import annotations

import datetime
import hashlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..errors import InputError
from ..progress import Progress
from ..view.compare_figures import draw_decoding, draw_learning, draw_training
from ..view.views import Picture
from .equal_models import count_parameters, equal_configs
from .learning import HELD_OUT, Learning, compare_learning
from .machine import describe_machine
from .plan import Plan
from .speed import Decoding, Training, compare_decoding, compare_training

PARTS = ("decoding", "training steps", "learning")


@dataclass(frozen=True)
class Comparison:
    """What was measured, where, and of what.

    Attributes:
        about: date, version and machine.
        text: its name, length in bytes and SHA-256.
        configs: of the models, by name; parameters: how many they have.
    """

    plan: Plan
    about: dict[str, Any]
    text: dict[str, Any]
    configs: dict[str, Any]
    parameters: dict[str, int]
    decoding: Decoding
    training: Training
    learning: Learning

    def figures(self) -> dict[str, Any]:
        """All of it for JSON; what was not measured is null."""
        parts: dict[str, Any] = {"decoding": self.decoding, "training": self.training, "learning": self.learning}
        models = {name: {"parameters": n, **asdict(self.configs[name])} for name, n in self.parameters.items()}
        figures: dict[str, Any] = _plain(
            {**self.about, "plan": asdict(self.plan), "text": self.text, "models": models}
            | {name: part._asdict() for name, part in parts.items()}
        )
        return figures


def compare(plan: Plan, text: bytes, name: str, progress: Callable[[str], Progress] | None = None) -> Comparison:
    """Runs all parts.

    Args:
        text: what the models learn from, see `check_text`; name: what it is called in the report.
        progress: given the name of a part, says who is told how far it is.

    Raises:
        InputError: a model failed; the message says why.
    """
    configs = equal_configs(plan.layers, plan.width, plan.context)
    reports = [progress(part) if progress is not None else None for part in PARTS]
    decoding = compare_decoding(plan, configs, reports[0])
    training = compare_training(plan, configs, reports[1])
    with tempfile.TemporaryDirectory(prefix="heronry-compare-") as folder:
        try:
            learning = compare_learning(plan, configs, text, Path(folder), reports[2])
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    about = {"date": now, "heronry": __version__, "threads": torch.get_num_threads(), "machine": describe_machine()}
    return Comparison(
        plan,
        about,
        {"name": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        configs,
        {name: count_parameters(name, config) for name, config in configs.items()},
        decoding,
        training,
        learning,
    )


def _plain(x: Any) -> Any:
    """Arrays as lists, nan as None."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, np.ndarray | list | tuple):
        return [_plain(value) for value in (x.tolist() if isinstance(x, np.ndarray) else x)]
    return None if isinstance(x, float) and math.isnan(x) else x


def table(found: Comparison) -> list[list[str]]:
    """A row for each model, below one with the headings."""
    decoding, training, learning = found.decoding, found.training, found.learning
    first, last = decoding.positions[0], decoding.positions[-1]
    short, long = training.contexts[0], training.contexts[-1]
    rows = [
        [
            "",
            "parameters",
            f"state at {first:,}, KB",
            f"state at {last:,}, KB",
            f"a token at {first:,}, ms",
            f"at {last:,}, ms",
            "times as long",
            "in PyTorch alone, ms",
            f"training a token, texts of {short:,}, µs",
            f"of {long:,}, µs",
            f"memory of a step, {short:,}, MB",
            f"{long:,}, MB",
            "bits a byte",
            "training, s",
        ]
    ]
    for name, n in found.parameters.items():
        plain = decoding.plain_seconds.get(name)
        rows.append(
            [
                name,
                f"{n:,}",
                *(f"{decoding.state_bytes[name][i] / 1e3:,.0f}" for i in (0, -1)),
                *(f"{1000 * decoding.seconds[name][i]:.3g}" for i in (0, -1)),
                f"{decoding.slowdown[name]:,.2f}",
                "" if plain is None else f"{1000 * plain:.3g}",
                *(f"{1e6 * training.seconds[name][i]:.3g}" for i in (0, -1)),
                *(f"{training.peak_bytes[name][i] / 1e6:,.0f}" for i in (0, -1)),
                f"{learning.held_out[name]:.3f}",
                f"{learning.seconds[name]:,.0f}",
            ]
        )
    return rows


def pictures(found: Comparison) -> list[Picture]:
    plan, decoding, training, learning = found.plan, found.decoding, found.training, found.learning
    step = f"{plan.batch} x {plan.context}"
    return [
        Picture(
            draw_decoding(decoding.positions, decoding.seconds, decoding.state_bytes, decoding.slowdown),
            "Reading one more token. RWKV, LSTM and AFT-simple have really read so many tokens, random ones; GPT and "
            "AFT-full get a cache of that size, filled with random numbers. RWKV takes its step in C++, the others run "
            "in PyTorch; the table has RWKV's time in PyTorch too. The biases that AFT-full needs for every position "
            "are weights, and not part of its state.",
        ),
        Picture(
            draw_training(training.contexts, training.seconds, training.peak_bytes, plan.step_tokens),
            "The forward and the backward pass of a step of training; the optimizer is the same for all. Every step "
            f"has {plan.step_tokens:,} tokens, in few long texts or in many short ones. The memory is the largest that "
            "a process of its own took beyond what it had with the model loaded: gradients and activations.",
        ),
        Picture(
            draw_learning(learning.tokens, learning.bits, learning.held_out, learning.seconds),
            f"All models read the same windows of {found.text['name']}, {plan.steps} steps of {step} bytes, with the "
            f"same optimizer and schedule and a learning rate of {plan.lr:g}. Held out is the last 1/{HELD_OUT} of the "
            "text; every window of it is read from an empty state.",
        ),
    ]


def describe(found: Comparison) -> str:
    """What the report says first."""
    about, machine = found.about, found.about["machine"]
    return "\n".join(
        [
            f"heronry {about['heronry']}, {about['date']}, threads: {about['threads']}, for decoding 1",
            ", ".join(f"{name} {value}" for name, value in machine.items()),
            f"text: {found.text['name']}, {found.text['bytes']:,} bytes, sha256 {found.text['sha256'][:16]}",
            f"All models have about as many parameters as the RWKV-7 of {found.plan.layers} layers and "
            f"{found.plan.width} channels. Times are medians of blocks that alternate.",
        ]
    )
