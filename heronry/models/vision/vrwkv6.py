"""VRWKV6, Vision-RWKV with the operator of RWKV-6.

What is special about it:
- heads with two matrices as state, for the patches before and after a patch in reading order; see ops/biwkv6
- five mixes and the decay depend on the data through low-rank matrices, as in RWKV-6
- mixes are the share of the neighbours
Source: the released code of Vision-RWKV (OpenGVLab/Vision-RWKV).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ...ops.biwkv6 import biwkv6
from ..layers import Linear, group_norm, widen
from .model import Grid, VisionModel, channel_ramps, check_config, common_sizes, shift_patches


@dataclass(frozen=True)
class VRWKV6Config:
    n_embd: int
    n_layer: int
    dim_ffn: int
    num_classes: int = 1000
    image_size: int = 224
    patch_size: int = 16
    head_hidden: int = 0
    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    final_norm: bool = True
    # settings that the tensors of a checkpoint do not show
    post_norm: bool = False
    init_values: float | None = None
    drop_path: float = 0.0
    decay_lr: float = 1.0
    shift: str = "q"

    causal = False

    def __post_init__(self) -> None:
        check_config(self)
        if self.head_size < 1 or self.n_embd % self.head_size:
            raise InputError(f"{self.n_embd} channels do not divide into heads of {self.head_size}")

    @property
    def heads(self) -> int:
        return self.n_embd // self.head_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VRWKV6Config:
        """Reads every size off the tensors of a checkpoint."""
        att = "layers.0.att."
        ranks: dict[str, Any] = {
            "mix_rank": shapes[f"{att}time_maa_w2"][1],
            "decay_rank": shapes[f"{att}time_decay_w1"][1],
        }
        return cls(**common_sizes(shapes), head_size=shapes[f"{att}time_faaaa"][1], **ranks)

    @classmethod
    def sized(cls, n_embd: int, n_layer: int, **other: Any) -> VRWKV6Config:
        """A new model with the widths of the published ones."""
        return cls(n_embd, n_layer, 4 * n_embd, **other)


class SpatialMix6(nn.Module):
    def __init__(self, config: VRWKV6Config):
        super().__init__()
        c, size = config.n_embd, config.head_size
        self.config, self.heads = config, config.heads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        # the share of the neighbours; the first is for the input that the other five are computed from
        self.time_maa_x, self.time_maa_w, self.time_maa_k = (parameter(1, 1, c) for _ in range(3))
        self.time_maa_v, self.time_maa_r, self.time_maa_g = (parameter(1, 1, c) for _ in range(3))
        # low-rank: y = (x @ _w1) @ _w2, not in the layout of nn.Linear
        self.time_maa_w1 = parameter(c, 5 * config.mix_rank)
        self.time_maa_w2 = parameter(5, config.mix_rank, c)
        self.time_decay = parameter(1, 1, c)
        self.time_decay_w1 = parameter(c, config.decay_rank)
        self.time_decay_w2 = parameter(config.decay_rank, c)
        self.time_faaaa = parameter(self.heads, size)
        self.receptance, self.key, self.value, self.gate, self.output = (Linear(c, c) for _ in range(5))
        self.ln_x = nn.GroupNorm(self.heads, c)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        d = shift_patches(x, grid, self.config, self.heads) - x  # [B, T, C]
        low = torch.tanh(torch.addcmul(x, d, self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        moved = torch.einsum("btmd,mdc->mbtc", low, self.time_maa_w2)
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        xw, xk, xv, xr, xg = (torch.addcmul(x, d, m + by) for m, by in zip(mixes, moved, strict=True))

        def per_head(x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, H, N]
            return torch.unflatten(x, -1, (self.heads, -1))

        log_w = -torch.exp(widen(self.time_decay) + widen(torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2))
        r, k, v = per_head(self.receptance(xr)), per_head(self.key(xk)), per_head(self.value(xv))
        y = biwkv6(r, per_head(log_w), k, v, self.time_faaaa)  # [B, T, H, N]
        return self.output(group_norm(y, self.ln_x) * F.silu(self.gate(xg)))

    def init_weights(self, rho: float, tau: float) -> None:
        channel, along, zigzag = channel_ramps(self.config.n_embd)
        for mix in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            mix.copy_(1 - channel**tau)
        self.time_maa_v.copy_(1 - (channel**tau + 0.3 * rho))
        for mix in (self.time_maa_r, self.time_maa_g):
            mix.copy_(1 - channel ** (tau / 2))
        self.time_decay.copy_(-6 + 5 * along ** (0.7 + 1.3 * rho))
        self.time_faaaa.copy_((rho * (1 - along) + 0.1 * zigzag).view_as(self.time_faaaa))
        for low in (self.time_maa_w1, self.time_maa_w2, self.time_decay_w1, self.time_decay_w2):
            nn.init.uniform_(low, -1e-4, 1e-4)


class VRWKV6(VisionModel):
    """Vision-RWKV over Bi-WKV6, a matrix per head and direction, with decays that depend on the picture."""

    name = "vrwkv6"
    Config = VRWKV6Config
    SpatialMix = SpatialMix6
