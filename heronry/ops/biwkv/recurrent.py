"""Bi-WKV token by token, with four running sums per channel: the paper's recurrent form.

A first pass gathers the sums over the whole picture, the future as seen before the first token. Then every token moves
from the future to the past: (a, b) of the past decay and gain it, (c, d) of the future lose it and grow. Memory is
these sums, whatever the size of the picture.

Subtracting a token from the future loses precision: once a token of weight e^30 has been subtracted, the rest is only
known to within e^30 times the rounding error of its sum. So the sums are held in float64, the possible error is
accumulated in a fifth sum, and where it could show in the output the future is gathered again from the tokens still to
come. README.md says how often. A caller with the picture in memory can keep the future at the end of every BLOCK tokens
and then only gathers from the rest of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .reference import NOTHING, add

EPSILON = 2.0**-53  # rounding error of one operation in float64
TOLERANCE = 1e-6  # error of the output, relative to the largest value, at which the future is gathered again
BLOCK = 64


@dataclass(frozen=True)
class Past:
    """Over all tokens read: the sums a of weighted values and b of weights, [B, A], in units of e^p."""

    a: Tensor
    b: Tensor
    p: Tensor


@dataclass(frozen=True)
class Future:
    """Over all tokens to come, the next one undecayed: the sums c of weighted values and d of weights, [B, A], in units
    of e^(q - read log_w).

    lost: bound on the rounding error of d. read: tokens read since the sums were gathered. q stays as it is: with their
    decays subtracted one by one it would be rounded, and no token would leave with exactly the weight that it was
    gathered with.
    """

    c: Tensor
    d: Tensor
    q: Tensor
    lost: Tensor
    read: int = 0


def begin(rows: int, channels: int, device: torch.device | str = "cpu") -> Past:
    """The past before the first token: empty sums [rows, channels]."""
    zeros = torch.zeros(rows, channels, dtype=torch.float64, device=device)
    return Past(zeros, zeros, torch.full_like(zeros, NOTHING))


def gather(log_w: Tensor, k: Tensor, v: Tensor, beyond: Future | None = None) -> Future:
    """The future as seen before the first of these tokens, k and v [B, T, A]; `beyond`: the future after the last one.
    So a picture may be gathered in strips, from its end to its beginning, and need never be in memory as a whole."""
    log_w, k, v = (x.double() for x in (log_w, k, v))
    if beyond is None:
        zeros = torch.zeros_like(k.sum(1))
        beyond = Future(zeros, zeros, torch.full_like(zeros, NOTHING), zeros)
    if k.shape[1] == 0:
        return beyond
    fade = torch.arange(k.shape[1], device=k.device)[:, None] * log_w  # [T, A]
    end = (k.shape[1] - beyond.read) * log_w
    q = torch.maximum((k + fade).amax(1), beyond.q + end).detach()
    weights, far = (k - q[:, None] + fade).exp(), (beyond.q - q + end).exp()
    c, d = (weights * v).sum(1) + far * beyond.c, weights.sum(1) + far * beyond.d
    return Future(c, d, q, (EPSILON * d + far * beyond.lost).detach())


def step(
    log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Past, future: Future, again: Callable[[], Future]
) -> tuple[Tensor, Past, Future]:
    """Reads the next token, k and v [B, A]; returns its output, float64 [B, A], and the past and future after it.

    again: gathers the future after this token; called where the rounding error may show in the output.
    """
    log_w, u, k, v = (x.double() for x in (log_w, u, k, v))
    weight = (k - future.q + future.read * log_w).exp()
    lost = future.lost + EPSILON * torch.maximum(future.d, weight).detach()
    future = Future(future.c - weight * v, future.d - weight, future.q, lost, future.read + 1)
    own = k + u
    y, error = _read(log_w, own, v, past, future)
    if bool((error > TOLERANCE).any()):
        future = again()
        y, _ = _read(log_w, own, v, past, future)
    return y, Past(*add((past.a, past.b, past.p), log_w, k, v)), future


def _read(log_w: Tensor, own: Tensor, v: Tensor, past: Past, future: Future) -> tuple[Tensor, Tensor]:
    """The output [B, A] of a token of weight e^own, and a bound on its error relative to the largest value."""
    q = future.q - future.read * log_w
    m = torch.maximum(torch.maximum(past.p, own), q).detach()
    before, here, after = (past.p - m).exp(), (own - m).exp(), (q - m).exp()
    total = before * past.b + here + after * future.d
    y = (before * past.a + here * v + after * future.c) / total
    return y, (2 * after * future.lost / total).detach().abs().nan_to_num(torch.inf)


def recurrent(log_w: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """See `biwkv`."""
    dtype = v.dtype
    # converted here, once: two large gradients of every token cancel, and float32 would round each of them
    log_w, k, v, u = (x.double() for x in (log_w, k, v, u))
    beyond: list[Future | None] = [None]  # the future at the end of every block, the last block first
    for start in reversed(range(0, k.shape[1], BLOCK)):
        beyond.append(gather(log_w, k[:, start : start + BLOCK], v[:, start : start + BLOCK], beyond[-1]))
    past, future, rest = begin(len(k), k.shape[2], k.device), beyond.pop(), None
    assert future is not None
    ys = []
    for t in range(k.shape[1]):
        if t % BLOCK == 0:
            rest = beyond.pop()
        block = slice(t + 1, t - t % BLOCK + BLOCK)
        again = partial(gather, log_w, k[:, block], v[:, block], rest)
        y, past, future = step(log_w, u, k[:, t], v[:, t], past, future, again)
        ys.append(y)
    return torch.stack(ys, dim=1).to(dtype)
