"""What is in the state while a text is read: how large and how rich each head's memory is, and what it is good for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import Model, State
from ..models.state import LayerState
from .inside import as_row, in_eval_mode, is_rwkv4

MAX_POINTS = 64  # at which the state is looked at
MAX_ROWS = 8  # states that run together; one of a large model takes many MB


class History(NamedTuple):
    """
    positions: [P], tokens read at each point.
    norms: [P, L, H], the Frobenius norm of each head's state.
    ranks: [P, L, H], its effective rank, from 1 to N: the exponential of the entropy of the singular values, as parts
        of their sum; 0 for an empty state.
    final: [L, H, N, N], value-major, after the last token.
    """

    positions: NDArray[Any]
    norms: NDArray[Any]
    ranks: NDArray[Any]
    final: NDArray[Any]


@torch.no_grad()
@in_eval_mode
def read_history(model: Model, tokens: Sequence[int]) -> History:
    """
    Raises:
        InputError: an RWKV-4, which has no heads.
    """
    check_has_heads(model)
    row = as_row(model, tokens)
    ends = np.unique(np.linspace(1, len(tokens), min(len(tokens), MAX_POINTS)).round().astype(int))
    state: State | None = None
    begin, norms, ranks = 0, [], []
    for end in ends.tolist():
        _, state = model(row[:, begin:end], state, last_only=True)
        begin = end
        wkv = matrices(state)
        norms.append(wkv.norm(dim=(-2, -1)).cpu().numpy())
        ranks.append(effective_rank(wkv).cpu().numpy())
    return History(ends, np.stack(norms), np.stack(ranks), wkv.cpu().numpy())


@torch.no_grad()
@in_eval_mode
def read_state(model: Model, tokens: Sequence[int]) -> State:
    """The state after a text that begins from nothing."""
    return model(as_row(model, tokens), last_only=True)[1]


def matrices(state: State) -> Tensor:
    """The matrices of one sequence's state, [L, H, N_v, N_k]."""
    return torch.stack([layer.wkv[0] for layer in state.layers])


def effective_rank(matrices: Tensor) -> Tensor:
    """See `History`. matrices: [..., N, N]. Source: Roy and Vetterli, "The effective rank" (EUSIPCO 2007)."""
    sizes: Tensor = torch.linalg.svdvals(matrices)
    total = sizes.sum(-1, keepdim=True)
    parts = sizes / total.clamp(min=1e-30)
    rank: Tensor = torch.special.entr(parts).sum(-1).exp()
    return rank * (total[..., 0] > 0)


def state_difference(first: State, second: State) -> NDArray[Any]:
    """How far apart the states of two sequences are, [L, H]: the Frobenius norm of the difference of each head, as a
    part of the larger of both norms. 0: equal; at most 2."""
    a, b = matrices(first), matrices(second)
    if a.shape != b.shape or first.fingerprint != second.fingerprint:
        raise InputError("the states belong to different models")
    larger = torch.maximum(*(x.norm(dim=(-2, -1)) for x in (a, b)))
    apart: NDArray[Any] = ((a - b).norm(dim=(-2, -1)) / larger.clamp(min=1e-30)).cpu().numpy()
    return apart


class Knockout(NamedTuple):
    """
    heads: [L, H], KL(next token || next token without what this head remembers), in nats; RWKV-4: H = 0.
    layers: [L], without what the whole layer remembers.
    """

    heads: NDArray[Any]
    layers: NDArray[Any]


@torch.no_grad()
@in_eval_mode
def knock_out(model: Model, tokens: Sequence[int]) -> Knockout:
    """What the last token's prediction loses when one head's or one layer's state is that of a text that has read
    nothing, with all other memory, that of the token shift and of RWKV-7b's attention too, as it is."""
    row = as_row(model, tokens, at_least=2)
    state = model(row[:, :-1], last_only=True)[1]
    empty = model.initial_state()
    n_layers, n_heads = len(state.layers), 0 if is_rwkv4(model) else state.layers[0].wkv.shape[1]
    silenced: list[tuple[int, slice]] = [(i, slice(None)) for i in range(n_layers)]
    silenced += [(i, slice(h, h + 1)) for i in range(n_layers) for h in range(n_heads)]
    whole = _next_token(model, row, state)
    kl = []
    for begin in range(0, len(silenced), MAX_ROWS):
        some = silenced[begin : begin + MAX_ROWS]
        rows = state[[0] * len(some)]
        layers = [LayerState(layer.att_shift, layer.wkv.clone(), layer.ffn_shift) for layer in rows.layers]
        for number, (i, heads) in enumerate(some):
            layers[i].wkv[number, heads] = empty.layers[i].wkv[0, heads]
        said = _next_token(model, row, State(layers, state.fingerprint, contexts=rows.contexts))
        kl.append((whole.exp() * (whole - said)).sum(-1).clamp(min=0))  # rounding may take it below
    values = torch.cat(kl).cpu().numpy()
    return Knockout(values[n_layers:].reshape(n_layers, n_heads), values[:n_layers])


def _next_token(model: Model, row: Tensor, state: State) -> Tensor:
    """Log-probabilities after the last token of `row`, for every row of the state [S, V]."""
    logits, _ = model(row[:, -1:].expand(state.rows, 1), state, last_only=True)
    return logits[:, 0].float().log_softmax(-1)


def check_has_heads(model: Model) -> None:
    if is_rwkv4(model):
        raise InputError("RWKV-4 keeps two sums a channel, not a matrix a head, so it has no norms and ranks of heads")
