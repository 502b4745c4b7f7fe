"""Baselines that RWKV is compared with: a plain LSTM, GPT and ViT, trained by the same loop.

- LSTM: torch's own, layers stacked, forget gates initially open (Jozefowicz et al., 2015)
- GPT: norms in front (GPT-2), rotary positions (arXiv 2104.09864), which learn faster than GPT-2's table, GELU
- ViT: norms in front, learned positions, GELU, the mean over all patches goes to the head (no class token)
They are for comparisons, not for checkpoints of others: `heronry.load` knows none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .base import Model, Network
from .layers import Linear, check_heads, embedding


@dataclass(frozen=True)
class LSTMConfig:
    vocab_size: int
    n_layer: int
    n_embd: int  # of the embedding
    hidden: int  # cells of a layer


class LSTM(Model):
    """`logits, state = model(tokens, state)`: tokens [B, T], logits [B, T, V], state (h, c), each [layers, B, hidden],
    or None."""

    name = "lstm"
    affine = False
    Config = LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.emb = embedding(config)
        self.lstm = nn.LSTM(config.n_embd, config.hidden, config.n_layer, batch_first=True)
        self.head = Linear(config.hidden, config.vocab_size)

    def forward(
        self, tokens: Tensor, state: Any = None, *, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Any]:
        _windows_only(self, cu_seqlens)
        y, state = self.lstm(self.emb(tokens), state)
        return self.head(y), state

    @torch.no_grad()
    def init_weights(self) -> None:
        """With smaller embeddings or heads it predicts mere token frequencies for hundreds of steps."""
        nn.init.normal_(self.emb.weight)
        nn.init.normal_(self.head.weight, std=self.config.hidden**-0.5)
        for name, p in self.lstm.named_parameters():
            if p.ndim == 1:
                p.zero_()
                if "_ih_" in name:  # of the two biases one is enough
                    p[self.config.hidden : 2 * self.config.hidden] = 1
            elif "_hh_" in name:
                for gate in p.split(self.config.hidden):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(p)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return _param_groups(self, lr, weight_decay)


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

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)  # [B, H, T, N]
        return self.output(y.transpose(1, 2).flatten(-2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: rotates each pair of channels of x [B, H, T, N] by its position times its frequency."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies  # [T, N / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class GPTBlock(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = Attention(config)
        self.ffn = nn.Sequential(
            Linear(config.n_embd, config.dim_ffn), nn.GELU(), Linear(config.dim_ffn, config.n_embd)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.ln1(x))
        y: Tensor = self.ffn(self.ln2(x))
        return x + y


class GPT(Model):
    """`logits, None = model(tokens)`: tokens [B, T], logits [B, T, V]. It has no state to carry on."""

    name = "gpt"
    affine = False
    Config = GPTConfig

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        check_heads(config)
        self.emb = embedding(config)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)

    def forward(
        self, tokens: Tensor, state: None = None, *, cu_seqlens: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, None]:
        _windows_only(self, cu_seqlens)
        if state is not None:
            raise InputError("a GPT has no state")
        x = self.emb(tokens)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.head(self.ln_out(x)), None

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

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return _param_groups(self, lr, weight_decay)


@dataclass(frozen=True)
class ViTConfig:
    n_embd: int
    n_layer: int
    dim_ffn: int
    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    head_size: int = 64

    @property
    def dim_att(self) -> int:
        return self.n_embd


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        c, f, self.size = config.n_embd, config.dim_ffn, config.head_size
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.output = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.ffn = nn.Sequential(nn.Linear(c, f), nn.GELU(), nn.Linear(f, c))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, N]
        x = x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = self.ffn(self.ln2(x))
        return x + y


class ViT(Network):
    """`logits = model(images)`: images [B, 3, height, width] of whole patches, logits [B, classes]. ViT-T of 224 pixels
    is ViTConfig(192, 12, 768)."""

    name = "vit"
    Config = ViTConfig

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        check_heads(config)
        self.patches = nn.Conv2d(3, config.n_embd, config.patch_size, config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, config.n_embd, *[config.image_size // config.patch_size] * 2))
        self.layers = nn.ModuleList(ViTBlock(config) for _ in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)  # [B, C, H, W]
        positions: Tensor = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions.float(), size=x.shape[2:], mode="bicubic").to(x.dtype)
        x = (x + positions).flatten(2).transpose(1, 2)
        for block in self.layers:
            x = self.run_block(block, x)
        logits: Tensor = self.head(self.ln_out(x).mean(1))
        return logits

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                module.bias.zero_()
        nn.init.trunc_normal_(self.positions, std=0.02)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return _param_groups(self, lr, weight_decay)


def _windows_only(model: Model, cu_seqlens: Tensor | Sequence[int] | None) -> None:
    if cu_seqlens is not None:
        raise InputError(f"the {model.name} of the comparisons reads windows (data.order=random), not packed documents")


def _param_groups(model: Network, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors."""
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    return [
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
    ]
