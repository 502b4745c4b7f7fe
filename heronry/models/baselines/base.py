"""What the baselines share: how they are read, and which of their weights decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from ...errors import InputError
from ..base import Model, Network
from ..state import State


class Baseline(Model):
    """A language model that reads windows; its state is what its `forward` returns, not a `State`."""

    affine = False

    def check_windows(self, cu_seqlens: Tensor | Sequence[int] | None) -> None:
        if cu_seqlens is not None:
            self._refuse_documents()

    def initial_state(self, rows: int = 1, time_states: Mapping[str, Tensor] | None = None) -> State:
        self._refuse_documents()

    def _refuse_documents(self) -> NoReturn:
        raise InputError(f"the {self.name} of the comparisons reads windows (data.order=random), not packed documents")

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return param_groups(self, lr, weight_decay)


def param_groups(model: Network, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    return [
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
    ]
