"""Through which layers and tokens an answer comes: causal tracing, and the influence of every input.

Causal tracing: noise on the embeddings of the subject makes the answer improbable. Then what one layer says at one
token is put back as it was without the noise, or what one layer remembers after a token. Where that brings the answer
back, the information passes through.
Source: Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from ..models.state import LayerState
from ..progress import Progress
from .inside import as_row, edit_stream, plain_modules, residual_stream

NOISE = 3.0  # standard deviations of the embedding
MAX_TOKENS = 512  # that run together


class Flow(NamedTuple):
    """
    restored: [L + 1, T], the probability of the answer with the input of the first block (0) or the output of a block
        (1 ... L) restored at one token, the mean over all draws of noise.
    remembered: [L, T], the same with everything that one layer remembers restored, its state after a token. After the
        last token nothing is read any more, so there it is `corrupted`.
    clean, corrupted: the probability without noise, and with it and nothing restored.
    """

    restored: NDArray[Any]
    remembered: NDArray[Any]
    clean: float
    corrupted: float


@torch.no_grad()
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
    stream, logits = residual_stream(model, row)
    e = stream[0]  # [1, T, C], the input of the first block
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, len(subject), e.shape[-1], generator=random).to(e) * NOISE * e.float().std()
    noisy = e.repeat(draws, 1, 1)
    noisy[:, list(subject)] += noise
    positions = range(min(subject), len(tokens))  # what is before the subject never changes
    n_layers, done = len(model.blocks), 0
    total = (2 * n_layers + 1) * len(positions)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with plain_modules(model):
        corrupted = float(_probability(model, row, noisy, answer).mean())
        restored = np.full((n_layers + 1, len(tokens)), corrupted, np.float32)
        step = max(1, MAX_TOKENS // noisy[..., 0].numel())
        for layer, x in enumerate(stream):
            for begin in range(positions.start, positions.stop, step):
                some = torch.arange(begin, min(begin + step, positions.stop), device=e.device)
                places = some.repeat_interleave(draws)  # of every row of the call
                restore = partial(_replace, places=places, values=x[0, places])
                found = _probability(model, row, noisy.repeat(len(some), 1, 1), answer, layer, restore)
                restored[layer, some.tolist()] = found.view(-1, draws).mean(1).cpu().numpy()
                advance(len(some))
        remembered = np.full((n_layers, len(tokens)), corrupted, np.float32)
        for place, states in _states(model, row, noisy, positions.start):
            step = max(1, MAX_TOKENS // (draws * (len(tokens) - place - 1)))
            for first in range(0, n_layers, step):
                layers = range(first, min(first + step, n_layers))
                state = State.stack([_with_layer(*states, layer) for layer in layers])
                rest = noisy[:, place + 1 :].repeat(len(layers), 1, 1)
                found = _probability(model, row[:, place + 1 :], rest, answer, state=state)
                remembered[list(layers), place] = found.view(-1, draws).mean(1).cpu().numpy()
                advance(len(layers))
    return Flow(restored, remembered, float(logits[0, -1].float().softmax(-1)[answer]), corrupted)


def _probability(
    model: Model,
    row: Tensor,
    first: Tensor,
    answer: int,
    layer: int = 0,
    edit: Callable[[Tensor], Tensor] | None = None,
    state: State | None = None,
) -> Tensor:
    """Of the answer after the tokens [1, T], [S].

    Args:
        first: [S, T, C], the input of the first block.
        layer, edit: what `edit_stream` does there.
        state: of S rows, that the tokens continue.
    """
    edits: list[Callable[[Tensor], Tensor] | None] = [None] * (len(model.blocks) + 1)
    edits[layer] = edit
    begin = edits[0]
    edits[0] = lambda _: begin(first) if begin is not None else first
    with edit_stream(model, edits):
        said, _ = model(row.expand(len(first), -1), state, last_only=True)
    return said[:, 0].float().softmax(-1)[:, answer]


def _replace(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """x [S, T, C] with one vector of each row, at `places` [S], replaced by `values` [S, C]."""
    x = x.clone()
    x[torch.arange(len(x), device=x.device), places] = values
    return x


def _instead(x: Tensor, _: Tensor) -> Tensor:
    return x


def _states(model: Model, row: Tensor, noisy: Tensor, begin: int) -> Iterator[tuple[int, tuple[State, State]]]:
    """The states after every token from `begin` to the one before the last: the place, and the states without noise
    [1] and with it [draws]."""
    clean = model(row[:, :begin])[1] if begin else model.initial_state()
    damaged = clean[[0] * len(noisy)]
    nothing: list[None] = [None] * len(model.blocks)
    for place in range(begin, row.shape[1] - 1):
        token, x = row[:, place : place + 1], noisy[:, place : place + 1]
        clean = model(token, clean)[1]
        with edit_stream(model, [partial(_instead, x), *nothing]):
            damaged = model(token.expand(len(noisy), 1), damaged)[1]
        yield place, (clean, damaged)


def _with_layer(clean: State, damaged: State, layer: int) -> State:
    """The damaged states with what one layer remembers as it is without noise."""
    layers = list(damaged.layers)
    layers[layer] = LayerState(*(x.expand(damaged.rows, *x.shape[1:]) for x in clean.layers[layer]))
    return State(layers, damaged.fingerprint, contexts=damaged.contexts)


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
