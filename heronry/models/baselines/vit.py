"""ViT: norms in front, learned positions, GELU, the mean over all patches goes to the head (no class token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Network
from ..layers import check_heads
from .base import param_groups


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
        return param_groups(self, lr, weight_decay)
