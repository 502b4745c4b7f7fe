"""What the model would say next after each layer: the residual stream of every layer, read by the model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models import Model
from .inside import as_row, in_eval_mode, residual_stream

PIECE = 64  # tokens of which all probabilities are in memory together


class Lens(NamedTuple):
    """For the input of the first block and the output of every block, L + 1.

    best: [L + 1, T], the most likely next token.
    probability: [L + 1, T], its probability.
    divergence: [L + 1, T], KL(what the model says at the end || what it would say here), in nats.
    """

    best: NDArray[Any]
    probability: NDArray[Any]
    divergence: NDArray[Any]


@torch.no_grad()
@in_eval_mode
def read_lens(model: Model, tokens: Sequence[int]) -> Lens:
    """Source: "interpreting GPT: the logit lens" (nostalgebraist, 2020)."""
    stream, _ = residual_stream(model, as_row(model, tokens))
    norm, head = model.get_submodule("ln_out"), model.get_submodule("head")

    def read(x: Tensor) -> Tensor:
        said: Tensor = head(norm(x)).float().log_softmax(-1)  # [T, V]
        return said

    parts = []
    for some in torch.cat(stream).split(PIECE, 1):  # [L + 1, T, C]
        final = read(some[-1])
        for x in some:
            said = read(x)
            best = said.max(-1)
            divergence = (final.exp() * (final - said)).sum(-1).clamp(min=0)  # rounding may take it below
            parts.append([part.cpu().numpy() for part in (best.indices, best.values.exp(), divergence)])
    rows = len(stream)
    return Lens(*(np.stack([np.concatenate(part[i::rows]) for i in range(rows)]) for part in zip(*parts, strict=True)))
