"""Embeddings: a text as one vector of unit length, so that the dot product of two is the cosine of their angle.

- the model runs without its head; no training is involved, and docs/embeddings.md says how good that is
- a text's vector is the same to the bit alone and beside others: it is read as a prompt is (call_sizes.py), and its
  mean is added up in cells of the grid, wherever it was cut
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, show
from ..models import Model, State
from ..progress import Progress
from .call_sizes import GRID
from .generate import check_prompts, prefill
from .options import whole_number

Pooling = Literal["mean", "state"]
GROUP = 64  # texts whose states are held at a time


def embedding_model(model: Model) -> Model:
    """The model without its head, on the same weights; states of one are states of the other."""
    body = model.without_head()
    body.set_fingerprint(model.fingerprint)
    return body


class Pooler:
    """What a text is embedded by, as it is read: `add` the outputs of its parts in order, then `finish`."""

    def __init__(self, pooling: Pooling = "mean"):
        if pooling not in get_args(Pooling):
            raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {show(pooling)}")
        self._pooling = pooling
        self._total: Tensor | None = None

    def add(self, outputs: Tensor) -> None:
        """outputs: [T, C] of a model without a head, for tokens that begin on the grid."""
        if self._pooling == "mean":
            for cell in outputs.detach().to("cpu", torch.float64).split(GRID):
                total = cell.sum(0)
                self._total = total if self._total is None else self._total + total

    def finish(self, state: State, dimensions: int | None = None) -> NDArray[np.float32]:
        """The vector [D] of unit length. state: one row, after the text; dimensions: so many of its first numbers."""
        pooled = _read_state(state) if self._total is None else self._total
        vector = pooled[:dimensions].to("cpu", torch.float64).numpy()
        norm = np.sqrt(np.square(vector).sum())
        if not np.isfinite(norm):
            raise InputError(
                "the embedding contains NaN or infinity: load the model in float32 or bfloat16, not float16"
            )
        return (vector / (norm or 1)).astype(np.float32)


def _read_state(state: State) -> Tensor:
    """The wkv state of the last layer as a vector; of RWKV-4, which has sums of values and of weights, the mean."""
    wkv = state.layers[-1].wkv[0].detach()
    return wkv[0] / wkv[1] if wkv.ndim == 2 else wkv.flatten()


def embedding_size(model: Model, pooling: Pooling) -> int:
    """The dimensions of a model's vectors."""
    return model.config.n_embd if pooling == "mean" else len(_read_state(model.initial_state()))


def embed(
    model: Model,
    prompts: Sequence[Sequence[int]],
    start: State | None = None,
    pooling: Pooling = "mean",
    dimensions: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Vectors of texts [N, D], float32.

    Args:
        model: with its head.
        prompts: token ids, at least one a text.
        start: the state of one row that every text begins from; None = the model's own.
        pooling, dimensions: see `LLM.embed`.
        progress: called with (tokens read, tokens in all).

    Raises:
        InputError: no texts, an empty one, an unknown pooling, dimensions that there are not.
    """
    check_prompts(prompts, None)
    poolers = [Pooler(pooling) for _ in prompts]
    body = embedding_model(model)
    size = embedding_size(body, pooling)
    if dimensions is not None and whole_number("dimensions", dimensions, 1) > size:
        raise InputError(f"dimensions must be a whole number from 1 to {size}, got {dimensions}")
    vectors: list[NDArray[np.float32]] = []
    total, done = sum(map(len, prompts)), 0
    for first in range(0, len(prompts), GROUP):
        group, own = prompts[first : first + GROUP], poolers[first : first + GROUP]
        report = progress and partial(_report, progress, done, total)
        before = None if start is None else start[[0] * len(group)]
        _, states = prefill(body, group, before, report, partial(_add, own))
        vectors += [pooler.finish(states[i], dimensions) for i, pooler in enumerate(own)]
        done += sum(map(len, group))
    return np.stack(vectors)


def _report(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _add(poolers: Sequence[Pooler], i: int, outputs: Tensor) -> None:
    poolers[i].add(outputs)
