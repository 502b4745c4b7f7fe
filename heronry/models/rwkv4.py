"""RWKV-4 "Dove".

What is special about it:
- attention without heads: each channel keeps a running mean of the values, weighted by e^key and decaying at a
  rate of its own; see ops/wkv4
- that mean is a quotient of two sums, so its state is the stable triple (a, b, p), not a matrix
- the receptance is a sigmoid gate in the time mix too
- mixes are the share of the current token (from RWKV-6 on, that of the previous one)
Source: "RWKV: Reinventing RNNs for the Transformer Era" (arXiv 2305.13048); parameter names are those of
BlinkDL's checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.wkv4 import wkv4
from .base import Model
from .layers import Linear, count_layers, embedding, last_shift, last_tokens, orthogonal_, token_shift, widen
from .sequence_parallel import Boundaries
from .state import LayerState, State


@dataclass(frozen=True)
class RWKV4Config:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    time_state: bool = False  # the initial state is a parameter (state tuning)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> RWKV4Config:
        """Reads every size off the tensors of a checkpoint."""
        vocab_size, n_embd = shapes["emb.weight"]
        return cls(
            vocab_size=vocab_size,
            n_layer=count_layers(shapes),
            n_embd=n_embd,
            dim_att=shapes["blocks.0.att.key.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            time_state="blocks.0.att.time_state" in shapes,
        )

    @classmethod
    def sized(cls, vocab_size: int, n_layer: int, n_embd: int) -> RWKV4Config:
        """A new model of this size with the widths of the training recipe."""
        return cls(vocab_size, n_layer, n_embd, n_embd, 4 * n_embd)


class TimeMix(nn.Module):
    def __init__(self, config: RWKV4Config):
        super().__init__()
        c, a = config.n_embd, config.dim_att
        self.time_decay = nn.Parameter(torch.zeros(a))
        self.time_first = nn.Parameter(torch.zeros(a))
        # mu-type mixes: the share of the current token
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (nn.Parameter(torch.zeros(1, 1, c)) for _ in range(3))
        self.time_state = nn.Parameter(torch.zeros(2, a)) if config.time_state else None
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.receptance = Linear(c, a)
        self.output = Linear(a, c)

    def initial_wkv(self, time_state: Tensor | None = None) -> Tensor:
        """The state before the first token, (a, b, p): [3, A]. `time_state` [2, A] replaces the model's own.

        A tuned state acts like one token that every text has read: in a channel with the pair (s, d) its weight is |s|,
        its value 1 + d where s > 0 and -(1 + d) where s < 0. All zeros are the empty state. So the mean stays between
        values; with a and b as free parameters it would be unbounded where b is small. At zero, s has a gradient and
        may go either way; a weight that only grows (s squared, e^s) has none there, and one that is clamped at zero
        stays there. The unit p is 0: in that of an empty state, e^-1e38, nothing has a gradient.
        """
        tuned = self.time_state if time_state is None else time_state
        if tuned is not None:
            s, d = widen(tuned)
            return torch.stack([s * (1 + d), s.abs(), torch.zeros_like(s)])
        like = self.time_decay
        wkv = widen(torch.zeros(3, len(like), dtype=like.dtype, device=like.device))
        wkv[2] = -1e38  # the exponent of an empty sum: unlike -inf it can be subtracted from itself
        return wkv

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, cu: Boundaries | None) -> tuple[Tensor, Tensor]:
        before = token_shift(x, shift, cu)  # [B, T, C]
        xk, xv, xr = (torch.lerp(before, x, m) for m in (self.time_mix_k, self.time_mix_v, self.time_mix_r))
        r = torch.sigmoid(self.receptance(xr))  # [B, T, A]
        k = widen(self.key(xk))  # exponents
        v = widen(self.value(xv))
        y, wkv = wkv4(-widen(self.time_decay).exp(), k, v, widen(self.time_first), wkv, cu_seqlens=cu)
        return self.output(r * y.to(x.dtype)), wkv


class ChannelMix(nn.Module):
    def __init__(self, config: RWKV4Config):
        super().__init__()
        c, f = config.n_embd, config.dim_ffn
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.zeros(1, 1, c)) for _ in range(2))
        self.key = Linear(c, f)
        self.receptance = Linear(c, c)
        self.value = Linear(f, c)

    def forward(self, x: Tensor, shift: Tensor, cu: Boundaries | None) -> Tensor:
        before = token_shift(x, shift, cu)
        xk, xr = torch.lerp(before, x, self.time_mix_k), torch.lerp(before, x, self.time_mix_r)
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)) ** 2)


class Block(nn.Module):
    def __init__(self, config: RWKV4Config, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: LayerState, cu: Boundaries | None) -> tuple[Tensor, LayerState]:
        x1 = self.ln1(x)
        y, wkv = self.att(x1, state.att_shift, state.wkv, cu)
        x = x + y
        x2 = self.ln2(x)
        x = x + self.ffn(x2, state.ffn_shift, cu)
        return x, LayerState(last_shift(x1, cu), wkv, last_shift(x2, cu))


class RWKV4(Model):
    """`logits, state = model(tokens, state)`, for a prompt, a training batch and a single step alike.

    tokens: integers [B, T]. state: a State of B rows, or None. cu_seqlens: packs many sequences into B = 1,
    one state row each. logits: [B, T, V]; with last_only [B, 1, V], packed [1, sequences, V]; float32 or in the dtype
    of the weights.
    """

    name = "rwkv4"
    Config = RWKV4Config
    affine = False  # its state is read as a quotient of two sums

    def __init__(self, config: RWKV4Config):
        super().__init__(config)
        self.emb = embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, State]:
        state, cu = self.validate_inputs(tokens, state, cu_seqlens)
        if step := self.select_native_step(tokens, state, cu):
            return step(tokens, state, cu, last_only)
        x = self.blocks[0].ln0(self.emb(tokens))  # [B, T, C]
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = self.run_block(block, x, layer, cu)
            layers.append(layer)
        if last_only:
            x = last_tokens(x, cu)
        return self.head(self.ln_out(x)), State(layers, state.fingerprint)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The initialisation of the training recipe; a model that starts elsewhere ends up worse."""
        vocab, c, a = self.config.vocab_size, self.config.n_embd, self.config.dim_att
        d = torch.arange(c) / c
        channel = torch.arange(a) / (a - 1)  # 0 .. 1
        zigzag = (torch.arange(a) + 1) % 3 - 1  # 0, 1, -1, 0, ...
        layers = self.config.n_layer

        orthogonal_(self.emb.weight, 1e-4 * max(vocab, c) ** 0.5)
        orthogonal_(self.head.weight, 0.5 * max(1.0, vocab / c) ** 0.5)
        for i, block in enumerate(self.blocks):
            rho = i / (layers - 1) if layers > 1 else 0.0  # 0 .. 1 over the layers
            tau = 1 - i / layers  # 1 .. 1 / layers
            att, ffn = block.att, block.ffn
            att.time_decay.copy_(-5 + 8 * channel ** (0.7 + 1.3 * rho))
            att.time_first.copy_(math.log(0.3) + 0.5 * zigzag)
            att.time_mix_k.copy_(d**tau)
            att.time_mix_v.copy_(d**tau + 0.3 * rho)
            att.time_mix_r.copy_(d ** (tau / 2))
            if self.config.time_state:
                att.time_state.zero_()
            ffn.time_mix_k.copy_(d**tau)
            ffn.time_mix_r.copy_(d**tau)
            orthogonal_(att.value.weight)
            orthogonal_(ffn.key.weight, max(1.0, self.config.dim_ffn / c) ** 0.5)
            for zero in (att.key, att.receptance, att.output, ffn.receptance, ffn.value):
                zero.weight.zero_()
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
            norm.bias.zero_()

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for Adam (betas 0.9, 0.99; eps 1e-8; the recipe's weight decay is 0): time_decay learns twice,
        time_first three times as fast; weight decay for matrices, embedding, head and a tuned state included, not for
        vectors."""
        twice, thrice, matrices, rest = [], [], [], []
        for name, p in self.named_parameters():
            if name.endswith("time_decay"):
                twice.append(p)
            elif name.endswith("time_first"):
                thrice.append(p)
            elif p.ndim == 2:
                matrices.append(p)
            else:
                rest.append(p)
        return [
            {"params": rest, "lr": lr, "weight_decay": 0.0},
            {"params": twice, "lr": 2 * lr, "weight_decay": 0.0},
            {"params": thrice, "lr": 3 * lr, "weight_decay": 0.0},
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        ]
