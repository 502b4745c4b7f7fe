"""How far back a model's memory reaches: the loss by position in long texts, and the recall of a planted fact."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..errors import InputError
from ..models import Model
from ..progress import Progress
from .inside import as_row, in_eval_mode

PIECE = 256  # tokens in a call of the model, of all rows together


class PositionLoss(NamedTuple):
    """
    positions: [P], of the tokens that are predicted, the geometric middle of each bin; 1 is the second token.
    loss: [P], the mean over the bin and all texts, in nats a token.
    error: [P], its standard error.
    """

    positions: NDArray[Any]
    loss: NDArray[Any]
    error: NDArray[Any]


@torch.no_grad()
@in_eval_mode
def loss_by_position(
    model: Model, texts: Sequence[Sequence[int]], bins: int = 24, progress: Progress | None = None
) -> PositionLoss:
    """
    Args:
        texts: token ids, all of the same length.

    Raises:
        InputError: no text, texts of different lengths, or of less than two tokens.
    """
    if not texts or len({len(text) for text in texts}) != 1 or len(texts[0]) < 2:
        raise InputError("texts of one length, of at least two tokens, are needed")
    rows = torch.tensor([list(text) for text in texts], device=model.device)
    length = rows.shape[1]
    state, losses = None, []
    step = max(1, PIECE // len(rows))
    for begin in range(0, length - 1, step):
        end = min(begin + step, length - 1)
        logits, state = model(rows[:, begin:end], state)
        loss = F.cross_entropy(logits.float().transpose(1, 2), rows[:, begin + 1 : end + 1], reduction="none")
        losses.append(loss.cpu())
        if progress is not None:
            progress(end, length - 1)
    each = torch.cat(losses, 1).double().numpy()  # [texts, length - 1]
    edges = np.unique(np.geomspace(1, length, bins + 1).round().astype(int))
    pairs = list(pairwise(edges))
    parts = [each[:, low - 1 : high - 1] for low, high in pairs]
    return PositionLoss(
        np.array([(low * max(low, high - 1)) ** 0.5 for low, high in pairs]),
        np.array([part.mean() for part in parts]),
        np.array([part.std() / part.size**0.5 for part in parts]),
    )


class Recall(NamedTuple):
    """
    distances: [P], tokens between the fact and the question.
    gain: [P], by how much the fact raises the log-probability of the answer, in nats, the mean of all fillers; 0: it is
        forgotten.
    probability: [P], of the answer with the fact, the geometric mean.
    """

    distances: NDArray[Any]
    gain: NDArray[Any]
    probability: NDArray[Any]


@torch.no_grad()
@in_eval_mode
def recall(
    model: Model,
    opening: Sequence[int],
    fact: Sequence[int],
    fillers: Sequence[Sequence[int]],
    question: Sequence[int],
    answer: Sequence[int],
    distances: Sequence[int],
    progress: Progress | None = None,
) -> Recall:
    """Asks for a fact after texts of several lengths.

    Args:
        opening: what every text begins with.
        fillers: texts between the fact and the question, at least as long as the largest distance.
        answer: what should follow the question, one token at least.
        distances: from small to large; 0: the question comes right after the fact.
    """
    if not fillers or min(map(len, fillers)) < max(distances):
        raise InputError(f"fillers of at least {max(distances)} tokens are needed")
    expected = torch.tensor([list(answer)] * len(fillers), device=model.device)[..., None]
    said = []  # [with and without the fact][distance]
    for done, known in enumerate((fact, ())):
        begun = [*opening, *known]
        state = model(as_row(model, begun), last_only=True)[1] if begun else model.initial_state()
        state = state[[0] * len(fillers)]
        begin, row = 0, []
        for distance in distances:
            for first in range(begin, distance, PIECE):
                piece = [list(filler[first : min(first + PIECE, distance)]) for filler in fillers]
                _, state = model(torch.tensor(piece, device=model.device), state, last_only=True)
            begin = distance
            asked = torch.tensor([[*question, *answer[:-1]]] * len(fillers), device=model.device)
            logits, _ = model(asked, state)
            each = logits[:, -len(answer) :].float().log_softmax(-1).gather(-1, expected)  # [fillers, tokens, 1]
            row.append(each.sum(1).mean().item())
            if progress is not None:
                progress(done * max(distances) + distance, 2 * max(distances))
        said.append(row)
    return Recall(np.array(distances), np.array(said[0]) - np.array(said[1]), np.exp(said[0]))
