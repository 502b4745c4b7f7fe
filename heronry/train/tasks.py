"""What the trainer needs to know of what is learned. language_modeling.py and image_classification.py implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ..models import Network, State

Autocast = AbstractContextManager[Any]
Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes
B = TypeVar("B")  # whatever the task hands to the trainer as one batch


class Task(Protocol[B]):
    """What a model learns and from which data; each process has an instance of its own.

    Attributes:
        unit: what is counted: "token" or "image".
        rows_per_step: rows (of tokens, or images) that all processes together read in a step.
        rows_per_epoch: rows in the training data.
    """

    unit: str
    rows_per_step: int
    rows_per_epoch: int

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of a tokenizer that belongs beside the model."""
        ...

    @property
    def notes(self) -> dict[str, Any]:
        """For the model's config.json, see `heronry.save`."""
        ...

    @property
    def can_evaluate(self) -> bool:
        """Whether there are evaluation data."""
        ...

    def describe(self) -> str:
        """The training data in a few words."""
        ...

    def source_metrics(self, step: int) -> dict[str, float]:
        """Of a mixture: how much of each source the steps before `step` have read; the same on all processes."""
        ...

    def flops_per_unit(self, model: Network) -> int:
        """Operations of the forward and the backward pass for one token or image."""
        ...

    def batches(self, step: int) -> Iterator[list[B]]:
        """What this process reads in a step: for each backward pass, the batches of its forward passes, in order."""
        ...

    def count_targets(self, batch: B) -> tuple[int, int]:
        """Predictions in a batch: those that count in the loss, and all."""
        ...

    def compute_loss(self, model: nn.Module, batch: B, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """Sums over a batch, with gradients: the cross entropy in nats, and the term of L2Wrap (see losses.py)."""
        ...

    def finish_step(self, applied: bool) -> None:
        """Called after the backward passes of a step. applied: False if the gradients were not finite."""
        ...

    def evaluate(self, model: Network, autocast: Autocast, reduce: Reduce) -> dict[str, float]:
        """Metrics on the evaluation data, the same on all processes: "eval_loss" in nats, and others of the task."""
        ...

    def carried_states(self) -> State | None:
        """The states at which the next step starts, those of all processes; None if the task carries none."""
        ...

    def load_carried_states(self, file: Path) -> None:
        """Restores this process's part of the states that `carried_states` returned, from a file of `State.save`."""
        ...
