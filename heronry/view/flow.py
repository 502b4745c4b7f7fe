"""Through which layers and tokens an answer comes: causal tracing, and the influence of every input.

Causal tracing: noise on the embeddings of the subject makes the answer improbable. Then what one layer says at one
token is put back as it was without the noise. Where that brings the answer back, the information passes through.
Source: Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import Model
from ..progress import Progress
from .inside import as_row, edit_stream, plain_modules, residual_stream

NOISE = 3.0  # standard deviations of the embedding
MAX_TOKENS = 2048  # that run together


class Flow(NamedTuple):
    """
    restored: [L + 1, T], the probability of the answer with the input of the first block (0) or the output of a block
        (1 ... L) restored at one token, the mean over all draws of noise.
    clean, corrupted: the probability without noise, and with it and nothing restored.
    """

    restored: NDArray[Any]
    clean: float
    corrupted: float


def trace(
    model: Model,
    tokens: Sequence[int],
    subject: Sequence[int],
    answer: int,
    draws: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Flow:
    """
    Args:
        subject: positions of the tokens that get noise.
        answer: the id of the token that follows.
        draws: of noise, the same for every place that is restored.

    Raises:
        InputError: an empty text, or a subject outside of it.
    """
    row = as_row(model, tokens)
    if not subject or min(subject) < 0 or max(subject) >= len(tokens):
        raise InputError(f"the subject must be within the {len(tokens)} tokens of the prompt")
    begin, places = min(subject), list(subject)  # what is before the subject never changes
    with torch.no_grad(), plain_modules(model):
        stream, logits = residual_stream(model, row)
        random = torch.Generator().manual_seed(seed)
        x = stream[0]
        noise = torch.randn(draws, len(places), x.shape[-1], generator=random).to(x) * NOISE * x.float().std()

        def run(layer: int, positions: Sequence[int]) -> Tensor:
            """The probability with the layer restored at each of the positions, [positions]; -1: at none."""
            rows = [(draw, position) for position in positions for draw in range(draws)]

            def corrupt(x: Tensor) -> Tensor:
                x = x.clone()
                for number, (draw, _) in enumerate(rows):
                    x[number, places] += noise[draw]
                return restore(x) if layer == 0 else x

            def restore(x: Tensor) -> Tensor:
                x = x.clone()
                for number, (_, position) in enumerate(rows):
                    if position >= 0:
                        x[number, position] = stream[layer][0, position]
                return x

            edits = [corrupt, *(restore if i + 1 == layer else None for i in range(len(model.blocks)))]
            with edit_stream(model, edits):
                said, _ = model(row.expand(len(rows), -1), last_only=True)
            probability: Tensor = said[:, 0].float().softmax(-1)[:, answer]
            return probability.view(len(positions), draws).mean(1)

        corrupted = float(run(0, [-1]))
        restored = np.full((len(stream), len(tokens)), corrupted, np.float32)
        size = max(1, MAX_TOKENS // (draws * len(tokens)))
        positions = range(begin, len(tokens))
        done = 0
        for layer in range(len(stream)):
            for first in range(0, len(positions), size):
                some = positions[first : first + size]
                restored[layer, some.start : some.stop] = run(layer, some).cpu().numpy()
                done += len(some)
                if progress is not None:
                    progress(done, len(stream) * len(positions))
        clean = float(logits[0, -1].float().softmax(-1)[answer])
    return Flow(restored, clean, corrupted)


def influence(model: Model, tokens: Sequence[int], answer: int) -> NDArray[Any]:
    """How much the answer's logit changes with what a layer says at a token: the length of its gradient, [L + 1, T];
    the first row is that of the embeddings."""
    with torch.enable_grad():
        parameters = [p for p in model.parameters() if p.requires_grad]
        try:
            model.requires_grad_(False)
            stream: list[Tensor] = []

            def begin(x: Tensor) -> Tensor:
                stream.append(x.detach().requires_grad_())
                return stream[0]

            with plain_modules(model), edit_stream(model, [begin, *[stream.append] * len(model.blocks)]):
                logits, _ = model(as_row(model, tokens), last_only=True)
            gradients = torch.autograd.grad(logits[0, 0, answer], stream)
        finally:
            for p in parameters:
                p.requires_grad_(True)
    return np.stack([x[0].float().norm(dim=-1).cpu().numpy() for x in gradients])
