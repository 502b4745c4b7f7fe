"""The stack that GPT and AFT share, whose attention differs: norms in front (GPT-2), GELU in the feed-forward part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Linear, embedding
from .base import Baseline


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens that a layer has read, in buffers that grow by doubling.

    A snapshot, like every state: what it holds never changes. What follows is written into the same buffers, or into
    new ones where another continuation stands there already.

    Attributes:
        buffers: keys and values, [..., room, N] each.
        length: how many tokens it holds.
        written: [tokens in the buffers], shared by all caches that use them.
    """

    buffers: tuple[Tensor, Tensor]
    length: int
    written: list[int]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Cache:
        """Of these tokens, [..., T, N]."""
        tokens = keys.shape[-2]
        return cls((keys, values), tokens, [tokens])

    @property
    def keys(self) -> Tensor:
        return self.buffers[0].narrow(-2, 0, self.length)

    @property
    def values(self) -> Tensor:
        return self.buffers[1].narrow(-2, 0, self.length)

    @property
    def nbytes(self) -> int:
        """Of what it holds; the buffers have room for up to twice as many tokens."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: Tensor, values: Tensor) -> Cache:
        """The cache after these tokens, [..., T, N]."""
        if torch.is_grad_enabled():  # autograd needs what is overwritten
            return Cache.of(torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2))
        length = self.length + keys.shape[-2]
        (old_keys, old_values), written = self.buffers, self.written
        if length > old_keys.shape[-2] or written[0] != self.length:
            room = max(length, 2 * self.length)
            old_keys, old_values, written = _grow(self.keys, room), _grow(self.values, room), [self.length]
        old_keys.narrow(-2, self.length, keys.shape[-2]).copy_(keys)
        old_values.narrow(-2, self.length, keys.shape[-2]).copy_(values)
        written[0] = length
        return Cache((old_keys, old_values), length, written)


def _grow(x: Tensor, room: int) -> Tensor:
    """A copy of x [..., T, N] at the beginning of a buffer [..., room, N]."""
    buffer = x.new_empty(*x.shape[:-2], room, x.shape[-1])
    buffer.narrow(-2, 0, x.shape[-2]).copy_(x)
    return buffer


class Block(nn.Module):
    def __init__(self, config: Any, attention: nn.Module):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = attention
        self.ffn = nn.Sequential(
            Linear(config.n_embd, config.dim_ffn), nn.GELU(), Linear(config.dim_ffn, config.n_embd)
        )

    def forward(self, x: Tensor, state: Any, *positions: Tensor) -> tuple[Tensor, Any]:
        y, state = self.att(self.ln1(x), state, *positions)
        x = x + y
        return x + self.ffn(self.ln2(x)), state


class Transformer(Baseline):
    """`logits, state = model(tokens, state)`: tokens [B, T], logits [B, T, V] (with last_only [B, 1, V]); the state is
    a list, what the attention of each layer keeps, or None."""

    def __init__(self, config: Any, attention: Callable[[Any], nn.Module]):
        super().__init__(config)
        self.emb = embedding(config)
        self.blocks = nn.ModuleList(Block(config, attention(config)) for _ in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)

    def positions(self, state: list[Any] | None, tokens: int) -> tuple[Tensor, ...]:
        """What the attention of every layer needs to know of the positions of these tokens."""
        return ()

    def forward(
        self,
        tokens: Tensor,
        state: list[Any] | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        self.check_windows(cu_seqlens)
        positions = self.positions(state, tokens.shape[1])
        x = self.emb(tokens)
        layers = []
        for block, layer in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, layer = self.run_block(block, x, layer, *positions)
            layers.append(layer)
        if last_only:
            x = x[:, -1:]
        return self.head(self.ln_out(x)), layers

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: the matrices that write to the residual stream start smaller the more layers there are."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("att.output.weight", "ffn.2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if last else 0.02)
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
            norm.bias.zero_()
