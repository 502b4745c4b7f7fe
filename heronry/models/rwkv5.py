"""RWKV-5 "Eagle" (5.2) and its forerunners 5.0 and 5.1.

What is special about it:
- heads with a matrix as state, which replaces RWKV-4's quotient of sums: no normaliser, a group norm follows
  instead; see ops/wkv5
- the receptance of the time mix is a query, without a sigmoid; a SiLU gate of its own gates the output (from 5.1)
- the decay is constant in time: one number per head (5.0, 5.1) or per key channel (5.2)
- mixes are the share of the current token, as in RWKV-4
Source: "Eagle and Finch" (arXiv 2404.05892); parameter names are those of BlinkDL's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..ops.wkv5 import wkv5
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
class RWKV5Config:
    vocab_size: int
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    head_size: int
    version: str = "5.2"  # "5.0" has no gate, "5.0" and "5.1" one decay per head
    log_bonus: bool = False  # the bonus is stored as its logarithm, time_first (most 5.0 files), not time_faaaa
    ln_x_eps: float = 64e-5  # BlinkDL divides by 8 = head_size_divisor before a norm of eps 1e-5
    time_state: bool = False  # the initial state is a parameter (state tuning)

    def __post_init__(self) -> None:
        check_heads(self)
        if self.version not in ("5.0", "5.1", "5.2"):
            raise InputError(f"unknown RWKV-5 version {self.version!r}; choose 5.0, 5.1 or 5.2")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> RWKV5Config:
        """Reads version and sizes off the tensors of a checkpoint."""
        vocab_size, n_embd = shapes["emb.weight"]
        dim_att = shapes["blocks.0.att.key.weight"][0]
        heads, *decay = shapes["blocks.0.att.time_decay"]
        if "blocks.0.att.gate.weight" not in shapes:
            version = "5.0"
        else:
            version = "5.2" if decay and decay[0] > 1 else "5.1"
        return cls(
            vocab_size=vocab_size,
            n_layer=count_layers(shapes),
            n_embd=n_embd,
            dim_att=dim_att,
            dim_ffn=shapes["blocks.0.ffn.key.weight"][0],
            head_size=dim_att // heads,
            version=version,
            log_bonus="blocks.0.att.time_first" in shapes,
            time_state="blocks.0.att.time_state" in shapes,
        )

    @classmethod
    def sized(
        cls, vocab_size: int, n_layer: int, n_embd: int, head_size: int = 64, version: str = "5.2"
    ) -> RWKV5Config:
        """A new model of this size with the widths of the training recipe."""
        dim_ffn = 4 * n_embd if version == "5.0" else int(3.5 * n_embd) // 32 * 32
        return cls(vocab_size, n_layer, n_embd, n_embd, dim_ffn, head_size, version, log_bonus=version == "5.0")


class TimeMix(nn.Module):
    def __init__(self, config: RWKV5Config):
        super().__init__()
        c, a, size = config.n_embd, config.dim_att, config.head_size
        self.heads = a // size
        self.gated = config.version != "5.0"

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        decays = (self.heads, size) if config.version == "5.2" else (self.heads,)
        self.time_decay = parameter(*decays)
        self.log_bonus = config.log_bonus
        if self.log_bonus:
            self.time_first = parameter(*decays)
        else:
            self.time_faaaa = parameter(*decays)
        # mu-type mixes: the share of the current token
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (parameter(1, 1, c) for _ in range(3))
        self.time_state = parameter(self.heads, size, size) if config.time_state else None
        self.receptance = Linear(c, a)
        self.key = Linear(c, a)
        self.value = Linear(c, a)
        self.output = Linear(a, c)
        if self.gated:
            self.time_mix_g = parameter(1, 1, c)
            self.gate = Linear(c, a)
        self.ln_x = nn.GroupNorm(self.heads, a, eps=config.ln_x_eps)

    def initial_wkv(self, time_state: Tensor | None = None) -> Tensor:
        """The state before the first token, [H, N_v, N_k]; `time_state` of the same shape replaces the model's own."""
        tuned = self.time_state if time_state is None else time_state
        if tuned is not None:
            return widen(tuned)
        size, like = self.ln_x.num_channels // self.heads, self.time_decay
        return widen(torch.zeros(self.heads, size, size, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor, shift: Tensor, wkv: Tensor, cu: Boundaries | None) -> tuple[Tensor, Tensor]:
        before = token_shift(x, shift, cu)  # [B, T, C]

        def per_head(x: Tensor) -> Tensor:  # [B, T, A] -> [B, T, H, N]
            return torch.unflatten(x, -1, (self.heads, -1))

        r = per_head(self.receptance(torch.lerp(before, x, self.time_mix_r)))
        k = per_head(self.key(torch.lerp(before, x, self.time_mix_k)))
        v = per_head(self.value(torch.lerp(before, x, self.time_mix_v)))
        # [H, N], or with one decay per head [H, 1], which broadcasts over the key channels
        log_w = -widen(self.time_decay).exp().view(self.heads, -1)
        u = widen(self.time_first).exp() if self.log_bonus else widen(self.time_faaaa)
        # values in float32: y has their dtype, and before its norm it can exceed the range of float16
        y, wkv = run_operator(wkv5, (r, log_w, k, widen(v), u.view(self.heads, -1)), wkv, cu)
        y = group_norm(y, self.ln_x).to(x.dtype)
        if self.gated:
            y = y * F.silu(self.gate(torch.lerp(before, x, self.time_mix_g)))
        return self.output(y), wkv


class ChannelMix(nn.Module):
    def __init__(self, config: RWKV5Config):
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
    def __init__(self, config: RWKV5Config, layer: int):
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


class RWKV5(Model):
    """`logits, state = model(tokens, state)`, for a prompt, a training batch and a single step alike.

    tokens: integers [B, T]. state: a State of B rows, or None. cu_seqlens: packs many sequences into B = 1,
    one state row each. logits: [B, T, V]; with last_only [B, 1, V], packed [1, sequences, V]; float32 or in the dtype
    of the weights.
    """

    name = "rwkv5"
    Config = RWKV5Config

    def __init__(self, config: RWKV5Config):
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
        per_channel = self.config.version == "5.2"
        decays = a if per_channel else a // self.config.head_size
        d = torch.arange(c) / c
        place = torch.arange(decays) / max(1, decays - 1)  # 0 .. 1 over all channels, before 5.2 over the heads
        zigzag = (torch.arange(decays) + 1) % 3 - 1  # 0, 1, -1, 0, ...
        layers = self.config.n_layer

        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        orthogonal_(self.head.weight, 0.5 * max(1.0, vocab / c) ** 0.5)
        for i, block in enumerate(self.blocks):
            rho = i / (layers - 1) if layers > 1 else 0.0  # 0 .. 1 over the layers
            tau = 1 - i / layers  # 1 .. 1 / layers
            att, ffn = block.att, block.ffn
            decay = -6 + 5 * place ** (0.7 + 1.3 * rho)
            att.time_decay.copy_(decay.view_as(att.time_decay))
            if self.config.log_bonus:
                att.time_first.fill_(-3)
            else:
                bonus = rho * (1 - place) + (0.1 * zigzag if per_channel else 0)
                att.time_faaaa.copy_(bonus.view_as(att.time_faaaa))
            att.time_mix_k.copy_(d**tau)
            att.time_mix_v.copy_(d**tau + 0.3 * rho)
            att.time_mix_r.copy_(d ** (tau / 2))
            ffn.time_mix_k.copy_(d**tau)
            ffn.time_mix_r.copy_(d**tau)
            if self.config.time_state:
                att.time_state.zero_()
            orthogonal_(att.receptance.weight)
            orthogonal_(att.value.weight)
            orthogonal_(att.key.weight, 0.1 if per_channel else 1.0)
            if att.gated:
                att.time_mix_g.copy_(d ** (tau / 2))
                orthogonal_(att.gate.weight, 0.1 if per_channel else 1.0)
            orthogonal_(ffn.key.weight, 1.0 if per_channel else max(1.0, self.config.dim_ffn / c) ** 0.5)
            for zero in (att.output, ffn.receptance, ffn.value):
                zero.weight.zero_()
            att.ln_x.weight.fill_(((1 + i) / layers) ** 0.7)
            att.ln_x.bias.zero_()
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.fill_(1)
            norm.bias.zero_()

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for AdamW (betas 0.9, 0.99; eps 1e-18): time_decay learns twice, time_first three times as fast;
        weight decay for matrices, embedding, head and a tuned state included, not for vectors."""
        twice, thrice, matrices, rest = [], [], [], []
        for name, p in self.named_parameters():
            if name.endswith("time_decay"):
                twice.append(p)
            elif name.endswith("time_first"):
                thrice.append(p)
            elif (name.endswith(".weight") and p.ndim == 2) or name.endswith("att.time_state"):
                matrices.append(p)
            else:
                rest.append(p)
        return [
            {"params": rest, "lr": lr, "weight_decay": 0.0},
            {"params": twice, "lr": 2 * lr, "weight_decay": 0.0},
            {"params": thrice, "lr": 3 * lr, "weight_decay": 0.0},
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        ]
