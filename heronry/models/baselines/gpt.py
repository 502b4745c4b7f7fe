"""GPT: attention to all earlier tokens, of which it keeps the keys and values: its state is the KV cache, which grows.

Its positions are rotary (arXiv 2104.09864), which learn faster than GPT-2's table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Linear, check_heads
from .transformer import Cache, Transformer


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_ffn: int
    head_size: int = 64

    @property
    def dim_att(self) -> int:
        return self.n_embd


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.size = config.head_size
        self.query, self.key, self.value, self.output = (Linear(config.n_embd, config.n_embd) for _ in range(4))

    def forward(self, x: Tensor, past: Cache | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Cache]:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, N]
        cache = Cache.of(k, v) if past is None else past.append(k, v)
        mask = None
        if past is not None and x.shape[1] > 1:
            mask = torch.ones(x.shape[1], cache.length, dtype=torch.bool, device=x.device).tril(past.length)
        y = F.scaled_dot_product_attention(q, cache.keys, cache.values, mask, is_causal=past is None)
        return self.output(y.transpose(1, 2).flatten(-2)), cache


def rotary_positions(begin: int, tokens: int, like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, size / 2] for the positions from `begin` on, on the device and in the dtype of `like`:
    each pair of channels turns by its position times its frequency."""
    half = size // 2
    frequencies = 10000.0 ** -(torch.arange(half, device=like.device, dtype=torch.float32) / half)
    angles = torch.arange(begin, begin + tokens, device=like.device)[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, N] at the positions of cos and sin."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GPT(Transformer):
    """See `Transformer`; the state is a list of a `Cache` a layer, keys and values [B, H, T, N]."""

    name = "gpt"
    Config = GPTConfig

    def __init__(self, config: GPTConfig):
        check_heads(config)
        super().__init__(config, Attention)

    def positions(self, state: list[Any] | None, tokens: int) -> tuple[Tensor, ...]:
        return rotary_positions(state[0].length if state else 0, tokens, self.ln_out.weight, self.config.head_size)
