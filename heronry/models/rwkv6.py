"""RWKV-6 "Finch" (x060).

What is special about it:
- the token shift depends on the data: low-rank matrices adjust the five mixes, in the order w, k, v, r, g
- so does the decay: one number per key channel and token; see ops/wkv6
- otherwise RWKV-5.2: matrix state per head, bonus for the current token inside the recurrence, group norm, gate
- mixes are the share of the previous token (up to RWKV-5, that of the current one)
Source: "Eagle and Finch" (arXiv 2404.05892); parameter names are those of BlinkDL's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.wkv6 import wkv6
from .base import Model
from .layers import (
    Linear,
    check_heads,
    count_layers,
    embedding,
    group_norm,
    last_shift,
    last_tokens,
    orthogonal_,
    token_shift,
    widen,
)
from .sequence_parallel import Boundaries, run_operator
from .state import LayerState, State


@dataclass(frozen=True)
class RWKV6Config:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    mix_rank: int
    decay_rank: int
    ln_x_eps: float = 64e-5  # BlinkDL divides by 8 = head_size_divisor before a norm of eps 1e-5
    time_state: bool = False  # the initial state is a parameter (state tuning)

    def __post_init__(self) -> None:
        check_heads(self)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> RWKV6Config:
        """Reads every size off the tensors of a checkpoint."""
        vocab_size, n_embd = shapes["emb.weight"]
        return cls(
            vocab_size=vocab_size,
            n_layer=count_layers(shapes),
            n_embd=n_embd,
            dim_att=shapes["blocks.0.att.key.weight"][0],
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            head_size=shapes["blocks.0.att.time_faaaa"][1],
            mix_rank=shapes["blocks.0.att.time_maa_w2"][1],
            decay_rank=shapes["blocks.0.att.time_decay_w1"][1],
            time_state="blocks.0.att.time_state" in shapes,
        )

    @classmethod
    def sized(cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64) -> RWKV6Config:
        """A new model of this size with the ranks and widths of the training recipe."""
        ranks = (64, 128) if n_embd >= 4096 else (32, 64)
        return cls(vocab_size, n_layer, n_embd, n_embd, int(3.5 * n_embd) // 32 * 32, head_size, *ranks)


class TimeMix(nn.Module):
    def __init__(self, config: RWKV6Config):
        super().__init__()
        c, a, size = config.n_embd, config.dim_att, config.head_size
        self.heads = a // size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        # m-type mixes: the share of the previous token
        self.time_maa_x = parameter(1, 1, c)  # of the input that the other five are computed from
        self.time_maa_w, self.time_maa_k, self.time_maa_v = (parameter(1, 1, c) for _ in range(3))
        self.time_maa_r, self.time_maa_g = (parameter(1, 1, c) for _ in range(2))
        # low-rank: y = (x @ _w1) @ _w2, not in the layout of nn.Linear
        self.time_maa_w1 = parameter(c, 5 * config.mix_rank)
        self.time_maa_w2 = parameter(5, config.mix_rank, c)
        self.time_decay = parameter(1, 1, a)
        self.time_decay_w1 = parameter(c, config.decay_rank)
        self.time_decay_w2 = parameter(config.decay_rank, a)
        self.time_faaaa = parameter(self.heads, size)
        self.time_state = parameter(self.heads, size, size) if config.time_state else None
        self.receptance = Linear(c, a)
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.gate = Linear(c, a)
        self.output = Linear(a, c)
        self.ln_x = nn.GroupNorm(self.heads, a, eps=config.ln_x_eps)

    def initial_wkv(self, time_state: Tensor | None = None) -> Tensor:
        """The state before the first token, [H, N_v, N_k]; `time_state` of the same shape replaces the model's own."""
        tuned = self.time_state if time_state is None else time_state
        if tuned is not None:
            return widen(tuned)
        like = self.time_faaaa
        return widen(torch.zeros(*like.shape, like.shape[1], dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, cu: Boundaries | None) -> tuple[Tensor, Tensor]:
        d = token_shift(x, shift, cu) - x  # [B, T, C]
        low = torch.tanh(torch.addcmul(x, d, self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        moved = torch.einsum("btmd,mdc->mbtc", low, self.time_maa_w2)
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (torch.addcmul(x, d, m + by) for m, by in zip(mixes, moved, strict=True))

        def per_head(x: Tensor) -> Tensor:  # [B, T, A] -> [B, T, H, N]
            return torch.unflatten(x, -1, (self.heads, -1))

        r = per_head(self.receptance(xr))
        k = per_head(self.key(xk))
        v = per_head(self.value(xv))
        g = F.silu(self.gate(xg))
        log_w = -(widen(self.time_decay) + widen(torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2)).exp()
        # values in float32: y has their dtype, and before its norm it can exceed the range of float16
        y, wkv = run_operator(wkv6, (r, per_head(log_w), k, widen(v), widen(self.time_faaaa)), wkv, cu)
        return self.output(group_norm(y, self.ln_x).to(x.dtype) * g), wkv


class ChannelMix(nn.Module):
    def __init__(self, config: RWKV6Config):
        super().__init__()
        c, f = config.n_embd, config.dim_ffn
        self.time_maa_k, self.time_maa_r = (nn.Parameter(torch.zeros(1, 1, c)) for _ in range(2))
        self.key = Linear(c, f)
        self.receptance = Linear(c, c)
        self.value = Linear(f, c)

    def forward(self, x: Tensor, shift: Tensor, cu: Boundaries | None) -> Tensor:
        d = token_shift(x, shift, cu) - x
        xk, xr = torch.addcmul(x, d, self.time_maa_k), torch.addcmul(x, d, self.time_maa_r)
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)) ** 2)


class Block(nn.Module):
    def __init__(self, config: RWKV6Config, layer: int):
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


class RWKV6(Model):
    """`logits, state = model(tokens, state)`, for a prompt, a training batch and a single step alike.

    tokens: integers [B, T]. state: a State of B rows, or None. cu_seqlens: packs many sequences into B = 1,
    one state row each. logits: [B, T, V]; with last_only [B, 1, V], packed [1, sequences, V]; float32 or in the dtype
    of the weights.
    """

    name = "rwkv6"
    Config = RWKV6Config

    def __init__(self, config: RWKV6Config):
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
        channel = torch.arange(a) / (a - 1)  # 0 .. 1 over all heads
        zigzag = (torch.arange(a) + 1) % 3 - 1  # 0, 1, -1, 0, ...
        layers = self.config.n_layer

        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        orthogonal_(self.head.weight, 0.5 * max(1.0, vocab / c) ** 0.5)
        for i, block in enumerate(self.blocks):
            rho = i / (layers - 1) if layers > 1 else 0.0  # 0 .. 1 over the layers
            tau = 1 - i / layers  # 1 .. 1 / layers
            att, ffn = block.att, block.ffn
            for mix in (att.time_maa_x, att.time_maa_w, att.time_maa_k):
                mix.copy_(1 - d**tau)
            att.time_maa_v.copy_(1 - (d**tau + 0.3 * rho))
            att.time_maa_r.copy_(1 - d ** (tau / 2))
            att.time_maa_g.copy_(1 - d ** (tau / 2))
            ffn.time_maa_k.copy_(1 - d ** (tau**3))
            ffn.time_maa_r.copy_(1 - d ** (tau**3))
            for down, up in ((att.time_maa_w1, att.time_maa_w2), (att.time_decay_w1, att.time_decay_w2)):
                down.zero_()
                up.uniform_(-0.01, 0.01)
            att.time_decay.copy_(-6 + 5 * channel ** (0.7 + 1.3 * rho))
            att.time_faaaa.copy_((rho * (1 - channel) + 0.1 * zigzag).view_as(att.time_faaaa))
            if self.config.time_state:
                att.time_state.zero_()
            orthogonal_(att.receptance.weight)
            orthogonal_(att.key.weight, 0.1)
            orthogonal_(att.value.weight)
            orthogonal_(att.gate.weight, 0.1)
            orthogonal_(ffn.key.weight)
            for zero in (att.output, ffn.receptance, ffn.value):
                zero.weight.zero_()
            att.ln_x.weight.fill_(((1 + i) / layers) ** 0.7)
            att.ln_x.bias.zero_()
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
            norm.bias.zero_()

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW (betas 0.9, 0.99; eps 1e-18): time_decay learns twice as fast; weight decay for matrices,
        embedding, head and a tuned state included, not for vectors and low-rank matrices."""
        fast, matrices, rest = [], [], []
        for name, p in self.named_parameters():
            if name.endswith("time_decay"):
                fast.append(p)
            elif (name.endswith(".weight") and p.ndim == 2) or name.endswith("att.time_state"):
                matrices.append(p)
            else:
                rest.append(p)
        return [
            {"params": rest, "lr": lr, "weight_decay": 0.0},
            {"params": fast, "lr": 2 * lr, "weight_decay": 0.0},
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        ]
