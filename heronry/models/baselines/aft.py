"""AFT, the attention-free transformer (arXiv 2105.14103) that RWKV comes from.

Per channel, a token reads a mean of the values so far, weighted by e^key and, in AFT-full, by a learned bias for every
pair of positions; its own query opens a gate:

    y_t = sigmoid(q_t) * sum_{s <= t} exp(k_s + w_ts) v_s / sum_{s <= t} exp(k_s + w_ts)

- AFT-full: w_ts = u_t . v_s, the paper's factorised form. Nothing of it can be summed up, as every t has biases of its
  own: the state is all keys and values, and no text can be longer than the tables u and v
- AFT-simple: w = 0. That is WKV4 without decay and without a bonus, and so is its state: two sums. It has no idea of
  order
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...ops.wkv4 import wkv4
from ..layers import Linear, widen
from .transformer import Cache, Transformer

BLOCK = 32  # queries at a time


@dataclass(frozen=True)
class AFTSimpleConfig:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int


@dataclass(frozen=True)
class AFTFullConfig:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    ctx_len: int  # positions that have a bias
    bias_rank: int = 128


class SimpleAttention(nn.Module):
    def __init__(self, config: AFTSimpleConfig):
        super().__init__()
        self.query, self.key, self.value, self.output = (Linear(config.n_embd, config.n_embd) for _ in range(4))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.query(x), widen(self.key(x)), widen(self.value(x))  # [B, T, C]
        nothing = k.new_zeros(k.shape[-1])  # neither decay nor bonus
        y, state = wkv4(nothing, k, v, nothing, state)
        return self.output(torch.sigmoid(q) * y.to(q.dtype)), state


class FullAttention(nn.Module):
    def __init__(self, config: AFTFullConfig):
        super().__init__()
        self.query, self.key, self.value, self.output = (Linear(config.n_embd, config.n_embd) for _ in range(4))
        self.bias_query, self.bias_key = (nn.Parameter(torch.zeros(config.ctx_len, config.bias_rank)) for _ in range(2))

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        q, k, v = self.query(x), widen(self.key(x)), widen(self.value(x))  # [B, T, C]
        cache = Cache.of(k, v) if past is None else past.append(k, v)
        end = cache.length
        if end > len(self.bias_query):
            raise InputError(f"this AFT-full has biases for {len(self.bias_query):,} positions, not for {end:,}")
        with torch.autocast(x.device.type, enabled=False):
            u, w = widen(self.bias_query[end - x.shape[1] : end]), widen(self.bias_key[:end])
            y = aft_full(cache.keys, cache.values, u, w)
        return self.output(torch.sigmoid(q) * y.to(q.dtype)), cache


def aft_full(k: Tensor, v: Tensor, bias_query: Tensor, bias_key: Tensor) -> Tensor:
    """The weighted means of AFT-full for the last T of S tokens: [B, T, A].

    A block of queries at a time, which is computed again in the backward pass: so memory grows with S, not its square.

    Args:
        k, v: [B, S, A].
        bias_query: [T, R]; bias_key: [S, R]. Their products are the biases.
    """
    tokens, before = len(bias_query), len(bias_key) - len(bias_query)
    means = []
    for begin in range(0, tokens, BLOCK):
        end = min(begin + BLOCK, tokens)
        read = slice(before + end)
        inputs = (k[:, read], v[:, read], bias_query[begin:end], bias_key[read])
        if torch.is_grad_enabled():
            means.append(checkpoint(_read_block, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            means.append(_read_block(*inputs))
    return torch.cat(means, 1)


def _read_block(k: Tensor, v: Tensor, bias_query: Tensor, bias_key: Tensor) -> Tensor:
    """`aft_full` for a few queries. With their own tokens they need a weight for each pair and channel, with those
    before them a matrix product, as exp(k + w) = exp(k) exp(w).

    Exponents are counted from the largest of each part, so keys may be of any size; biases, which are learned with
    weight decay, must differ by less than 80.
    """
    tokens = len(bias_query)
    n = k.shape[1] - tokens
    bias = bias_query @ bias_key.T  # [t, n + t]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
    near = (k[:, None, n:] + bias[:, n:, None]).masked_fill(future[..., None], -torch.inf)  # [B, t, t, A]
    top = near.detach().amax(2)  # [B, t, A]
    near = (near - top[:, :, None]).exp()
    weights, sums = near.sum(2), (near * v[:, None, n:]).sum(2)
    if n:
        k_top, bias_top = k[:, :n].detach().amax(1, keepdim=True), bias[:, :n].detach().amax(1, keepdim=True)
        by_key, by_bias = (k[:, :n] - k_top).exp(), (bias[:, :n] - bias_top).exp()  # [B, n, A], [t, n]
        largest = torch.maximum(top, k_top + bias_top)
        near_part, far_part = (top - largest).exp(), (k_top + bias_top - largest).exp()
        weights = near_part * weights + far_part * (by_bias @ by_key)
        sums = near_part * sums + far_part * (by_bias @ (by_key * v[:, :n]))
    return sums / weights


class AFTSimple(Transformer):
    """See `Transformer`; the state is a list of a tensor a layer, that of `wkv4`, [B, 3, C]."""

    name = "aft-simple"
    Config = AFTSimpleConfig

    def __init__(self, config: AFTSimpleConfig):
        super().__init__(config, SimpleAttention)


class AFTFull(Transformer):
    """See `Transformer`; the state is a list of a `Cache` a layer, keys and values [B, T, C]."""

    name = "aft-full"
    Config = AFTFullConfig

    def __init__(self, config: AFTFullConfig):
        super().__init__(config, FullAttention)
