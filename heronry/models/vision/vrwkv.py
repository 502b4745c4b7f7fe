"""VRWKV, Vision-RWKV with the operator of RWKV-4.

What is special about it:
- attention without heads: for each channel a mean of the values of all patches, weighted by e^key and by the distance
  in reading order; see ops/biwkv
- decay and bonus are divided by the number of patches, with no exp: one model reads pictures of any size
- mixes are the share of the patch itself
Source: "Vision-RWKV" (arXiv 2403.02308) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...ops.biwkv import biwkv
from ...ops.wkv4 import wkv4
from ..layers import Linear, widen
from .model import Grid, VisionModel, channel_ramps, check_config, common_sizes, shift_patches


@dataclass(frozen=True)
class VRWKVConfig:
    n_embd: int
    n_layer: int
    dim_ffn: int
    num_classes: int = 1000  # 0: no head
    image_size: int = 224  # of the position embedding, in pixels; other sizes are interpolated
    patch_size: int = 16
    head_hidden: int = 0  # of a head with a hidden layer, as L has
    key_norm: bool = False
    final_norm: bool = True  # after the last layer; the backbones of segmentation and detection have none
    # settings that the tensors of a checkpoint do not show
    post_norm: bool = False
    init_values: float | None = None  # initial value of the gammas; None: there are none
    drop_path: float = 0.0  # of the last layer, in training; the first has 0
    decay_lr: float = 1.0  # the learning rate of the decays, as a multiple of the others'
    shift: str = "q"  # "q", or for comparisons "previous" (the token shift of text) or "none"
    causal: bool = False  # for comparisons: attention looks back only
    segments: int | None = None  # 32: the arithmetic of the released CUDA kernel, see ops/biwkv

    heads = 1

    def __post_init__(self) -> None:
        check_config(self)
        if self.segments is not None and (type(self.segments) is not int or self.segments < 1 or self.causal):
            raise InputError(f"segments must be a positive number and the attention bidirectional, got {self.segments}")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> VRWKVConfig:
        """Reads every size off the tensors of a checkpoint."""
        return cls(**common_sizes(shapes), key_norm="layers.0.att.key_norm.weight" in shapes)

    @classmethod
    def sized(cls, n_embd: int, n_layer: int, **other: Any) -> VRWKVConfig:
        """A new model with the widths of the published ones."""
        return cls(n_embd, n_layer, 4 * n_embd, **other)


class SpatialMix(nn.Module):
    def __init__(self, config: VRWKVConfig):
        super().__init__()
        c = config.n_embd
        self.config = config
        self.spatial_decay = nn.Parameter(torch.zeros(c))
        self.spatial_first = nn.Parameter(torch.zeros(c))
        # the share of the token itself
        self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r = (
            nn.Parameter(torch.zeros(1, 1, c)) for _ in range(3)
        )
        self.key, self.value, self.receptance, self.output = (Linear(c, c) for _ in range(4))
        self.key_norm = nn.LayerNorm(c) if config.key_norm else nn.Identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        near = shift_patches(x, grid, self.config)  # [B, T, C]
        mixes = (self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r)
        k, v, r = (
            f(torch.lerp(near, x, m)) for f, m in zip((self.key, self.value, self.receptance), mixes, strict=True)
        )
        tokens = x.shape[1]
        log_w, u = -widen(self.spatial_decay) / tokens, widen(self.spatial_first) / tokens
        if self.config.causal:  # both operators compute in float32, whatever they read
            y, _ = wkv4(log_w, k, v, u)
        else:
            y = biwkv(log_w, k, v, u, segments=self.config.segments)
        return self.output(torch.sigmoid(r) * self.key_norm(y))

    def init_weights(self, rho: float, tau: float) -> None:
        channel, along, zigzag = channel_ramps(self.config.n_embd)
        self.spatial_decay.copy_(-5 + 8 * along ** (0.7 + 1.3 * rho))
        self.spatial_first.copy_(math.log(0.3) + 0.5 * zigzag)
        self.spatial_mix_k.copy_(channel**tau)
        self.spatial_mix_v.copy_(channel**tau + 0.3 * rho)
        self.spatial_mix_r.copy_(channel ** (tau / 2))


class VRWKV(VisionModel):
    """Vision-RWKV over Bi-WKV, one decay per channel (arXiv 2403.02308)."""

    name = "vrwkv"
    Config = VRWKVConfig
    SpatialMix = SpatialMix
