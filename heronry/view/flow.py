"""Through which layers and tokens an answer comes: causal tracing, and the influence of every input.

Causal tracing: noise on the embeddings of the subject makes the answer improbable. Then what one layer says at one
token is put back as it was without the noise, or what one layer remembers after a token. Where that brings the answer
back, the information passes through.
Source: Meng et al., "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from ..models.state import Context, LayerState
from ..progress import Progress
from .inside import as_row, edit_stream, plain_modules, residual_stream

NOISE = 3.0  # standard deviations of the embedding
MAX_TOKENS = 512  # that run together
MAX_ROWS = 16  # states that run together


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
    begin, end, n_layers = min(subject), len(tokens), len(model.blocks)  # what is before the subject never changes
    with plain_modules(model):
        clean = model(row[:, :begin], last_only=True)[1] if begin else model.initial_state()
        damaged = clean[[0] * draws]
        corrupted = float(_probability(model, row[:, begin:], noisy[:, begin:], answer, damaged).mean())
        restored = np.full((n_layers + 1, end), corrupted, np.float32)
        remembered = np.full((n_layers, end), corrupted, np.float32)
        for place in range(begin, end):  # the states are those before this token, and from here on it is read again
            rest, tail = row[:, place:], noisy[:, place:]
            for layers in _parts(n_layers + 1, draws, end - place):
                values = {layer: stream[layer][0, place] for layer in layers}
                state = damaged[[*range(draws)] * len(layers)]
                found = _probability(model, rest, tail.repeat(len(layers), 1, 1), answer, state, values)
                restored[list(layers), place] = found.view(-1, draws).mean(1).cpu().numpy()
            if place < end - 1:
                clean = model(rest[:, :1], clean)[1]
                with edit_stream(model, [partial(_instead, tail[:, :1]), *[None] * n_layers]):
                    damaged = model(rest[:, :1].expand(draws, 1), damaged)[1]
                for layers in _parts(n_layers, draws, end - place - 1):
                    state = State.stack([_with_layer(clean, damaged, layer) for layer in layers])
                    found = _probability(model, rest[:, 1:], tail[:, 1:].repeat(len(layers), 1, 1), answer, state)
                    remembered[list(layers), place] = found.view(-1, draws).mean(1).cpu().numpy()
            if progress is not None:
                progress(place + 1 - begin, end - begin)
    return Flow(restored, remembered, float(logits[0, -1].float().softmax(-1)[answer]), corrupted)


def _parts(layers: int, draws: int, length: int) -> Iterator[range]:
    """The layers in parts that run together, each with all draws of a text of `length` tokens."""
    step = max(1, min(MAX_TOKENS // length, MAX_ROWS) // draws)
    return (range(first, min(first + step, layers)) for first in range(0, layers, step))


def _probability(
    model: Model,
    row: Tensor,
    first: Tensor,
    answer: int,
    state: State,
    values: Mapping[int, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Of the answer after the tokens [1, T], [S].

    Args:
        first: [S, T, C], the input of the first block.
        state: of S rows, that the tokens continue.
        values: of layers, as `edit_stream` counts them, what takes the place of the first token's vector [C]. Each is
            put into rows of its own, as many for each, in this order.
    """
    edits: list[Callable[[Tensor], Tensor] | None] = [None] * (len(model.blocks) + 1)
    first = first.clone() if 0 in values else first
    edits[0] = partial(_instead, first)
    for i, (layer, value) in enumerate(values.items()):
        rows = slice(i * len(first) // len(values), (i + 1) * len(first) // len(values))
        if layer == 0:
            first[rows, 0] = value
        else:
            edits[layer] = partial(_replace, rows=rows, value=value)
    with edit_stream(model, edits):
        said, _ = model(row.expand(len(first), -1), state, last_only=True)
    return said[:, 0].float().softmax(-1)[:, answer]


def _instead(x: Tensor, _: Tensor) -> Tensor:
    return x


def _replace(x: Tensor, rows: slice, value: Tensor) -> Tensor:
    """x [S, T, C] with `value` [C] as the first token of some rows."""
    x = x.clone()
    x[rows, 0] = value
    return x


def _with_layer(clean: State, damaged: State, layer: int) -> State:
    """The damaged states with what one layer remembers as it is without noise."""
    layers = list(damaged.layers)
    layers[layer] = LayerState(*(x.expand(damaged.rows, *x.shape[1:]) for x in clean.layers[layer]))
    contexts = [_with_layer_of(clean.contexts[0], context, layer) for context in damaged.contexts]
    return State(layers, damaged.fingerprint, contexts=contexts)


def _with_layer_of(clean: Context, damaged: Context, layer: int) -> Context:
    """What RWKV-7b's attention remembers, with one layer's part as it is without noise."""
    places = torch.arange(len(damaged.kc), device=damaged.kc.device) == layer
    kc, vc = (torch.where(places[:, None, None], x, y) for x, y in ((clean.kc, damaged.kc), (clean.vc, damaged.vc)))
    return Context(damaged.tokens, kc, vc, torch.where(places[:, None], clean.q, damaged.q))


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
