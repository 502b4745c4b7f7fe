"""Bi-WKV as a picture is read token by token, with four running sums a channel: the paper's recurrent form.

One pass over the picture gathers the sums over all of it, the future of a reader who stands before the first token.
Then every token moves from the future to the past: (a, b) of the past decay and gain it, (c, d) of the future lose it
and grow. Memory is these sums whatever the picture's size.

What leaves the future by subtraction takes digits with it: after a token of weight e^30 is gone, all that is left is
known to e^30 times the rounding of its sum. So the sums are held in float64, what has been lost is counted in a fifth
sum, and where it would show in the output the future is gathered once more from the tokens that are still to come. See
README.md for how often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .reference import NOTHING, add

EPSILON = 2.0**-53  # of one operation in float64
TOLERANCE = 1e-6  # of the output, as a share of the largest value: what may be lost before the future is gathered anew


@dataclass(frozen=True)
class Past:
    """Of all tokens read: the sums of weighted values and of weights, [B, A], in units e^p."""

    a: Tensor
    b: Tensor
    p: Tensor


@dataclass(frozen=True)
class Future:
    """Of all tokens to come, the next one undecayed: likewise in units e^q, and what rounding may have lost."""

    c: Tensor
    d: Tensor
    q: Tensor
    lost: Tensor


def begin(rows: int, channels: int, device: torch.device | str = "cpu") -> Past:
    """Nothing has been read."""
    zeros = torch.zeros(rows, channels, dtype=torch.float64, device=device)
    return Past(zeros, zeros, torch.full_like(zeros, NOTHING))


def gather(log_w: Tensor, k: Tensor, v: Tensor, beyond: Future | None = None) -> Future:
    """The future before the first of these tokens, k and v [B, T, A]; `beyond` that after the last. So a picture may
    be gathered in strips, from its end to its beginning, and need never lie in memory whole."""
    log_w, k, v = (x.double() for x in (log_w, k, v))
    if beyond is None:
        beyond = Future(*(torch.zeros_like(k[:, 0] if k.shape[1] else k.sum(1)) for _ in range(4)))
        beyond = replace(beyond, q=torch.full_like(beyond.q, NOTHING))
    if k.shape[1] == 0:
        return beyond
    exponents = k + torch.arange(k.shape[1], device=k.device)[:, None] * log_w  # [B, T, A]
    end = beyond.q + k.shape[1] * log_w
    q = torch.maximum(exponents.amax(1), end).detach()
    weights, far = (exponents - q[:, None]).exp(), (end - q).exp()
    c, d = (weights * v).sum(1) + far * beyond.c, weights.sum(1) + far * beyond.d
    return Future(c, d, q, (EPSILON * d + far * beyond.lost).detach())


def step(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Past, future: Future, again: Callable[[], Future]
) -> tuple[Tensor, Past, Future]:
    """Reads the next token, k and v [B, A]: its output in float64, and both sums after it.

    again: gathers the future after this token; called where what has been lost may show in the output.
    """
    log_w, u, k, v = (x.double() for x in (log_w, u, k, v))
    weight = (k - future.q).exp()
    lost = future.lost + EPSILON * torch.maximum(future.d, weight).detach()
    # what is left has come a token nearer
    future = Future(future.c - weight * v, future.d - weight, future.q - log_w, lost)
    own = k + u
    y, error = _read(own, v, past, future)
    if bool((error > TOLERANCE).any()):
        future = again()
        y, _ = _read(own, v, past, future)
    return y, Past(*add((past.a, past.b, past.p), log_w, k, v)), future


def _read(own: Tensor, v: Tensor, past: Past, future: Future) -> tuple[Tensor, Tensor]:
    """The output of a token of weight e^own, and by how much of the largest value it may be off."""
    m = torch.maximum(torch.maximum(past.p, own), future.q).detach()
    before, here, after = (past.p - m).exp(), (own - m).exp(), (future.q - m).exp()
    total = before * past.b + here + after * future.d
    y = (before * past.a + here * v + after * future.c) / total
    return y, (2 * after * future.lost / total).detach().abs().nan_to_num(torch.inf)


def recurrent(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    past, future = begin(len(k), k.shape[2], k.device), gather(log_w, k, v)
    ys = []
    for t in range(k.shape[1]):
        again = partial(gather, log_w, k[:, t + 1 :], v[:, t + 1 :])
        y, past, future = step(log_w, u, k[:, t], v[:, t], past, future, again)
        ys.append(y)
    return torch.stack(ys, dim=1).to(v.dtype)
