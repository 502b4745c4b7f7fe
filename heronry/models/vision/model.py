"""What both kinds of Vision-RWKV, in vrwkv.py and vrwkv6.py, have in common: a bidirectional RWKV that reads pictures.

What is special about it:
- the patches of a picture are the tokens, row by row; attention looks both ways, so that its cost grows with the
  number of patches and not with its square
- Q-shift in place of the token shift: a quarter of the channels comes from each of the four neighbours
- no class token: the mean over all patches goes to the head
- T has its norms before each branch; the larger ones have them after it, and scale each branch by a gamma
Source: "Vision-RWKV" (arXiv 2403.02308) and its released code; parameter names are those of its checkpoints without
their "backbone.".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError, show, unknown_name
from ..base import Network
from ..layers import Linear, widen

Grid = tuple[int, int]  # rows and columns of patches
SHIFTS = ("q", "previous", "none")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0 .. 1: red, green, blue


def common_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The settings that both kinds read off a checkpoint. Norms come after the branches where there are gammas, as in
    all published models."""
    _, tokens, n_embd = shapes["pos_embed"]
    patch = shapes["patch_embed.projection.weight"][2]
    if math.isqrt(tokens) ** 2 != tokens:
        raise InputError(f"pos_embed has {tokens} tokens, expected a square number")
    layers = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.")}
    if missing := sorted(set(range(len(layers))) - layers):
        raise InputError(f"layers.{missing[0]} is missing")
    head = next((shapes[key] for key in ("head.fc.weight", "head.2.weight") if key in shapes), (0,))
    scaled = "layers.0.gamma1" in shapes
    return {
        "n_embd": n_embd,
        "n_layer": len(layers),
        "dim_ffn": shapes["layers.0.ffn.key.weight"][0],
        "num_classes": head[0],
        "image_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "head_hidden": shapes["head.0.weight"][0] if "head.0.weight" in shapes else 0,
        "post_norm": scaled,
        "init_values": 1.0 if scaled else None,
        # the backbones of segmentation and detection have none, nor a head
        "final_norm": "ln1.weight" in shapes or head[0] > 0,
    }


def check_config(config: Any) -> None:
    """InputError for impossible values of the settings that both kinds have."""
    for name in ("n_embd", "n_layer", "dim_ffn", "patch_size"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.num_classes < 0:
        raise InputError(f"num_classes must be at least 0 (which is no head), got {config.num_classes}")
    if config.image_size < config.patch_size or config.image_size % config.patch_size:
        raise InputError(f"image_size {config.image_size} is not made of patches of {config.patch_size}")
    if config.shift not in SHIFTS:
        raise unknown_name("shift", config.shift, SHIFTS)
    if not 0 <= config.drop_path < 1:
        raise InputError(f"drop_path must lie in [0, 1), got {config.drop_path}")
    if not config.decay_lr > 0:
        raise InputError(f"decay_lr must be positive, got {config.decay_lr}")


def q_shift(x: Tensor, grid: Grid, heads: int = 1) -> Tensor:
    """x [B, T, C] with the four quarters of each head's channels taken from the left, right, upper and lower neighbour,
    zeros at the border; the remainder of a division by four stays in place."""
    x = x.unflatten(1, grid).unflatten(-1, (heads, -1))  # [B, H, W, heads, N]
    quarter = x.shape[-1] // 4
    left, right, above, below, rest = x.split([quarter] * 4 + [x.shape[-1] - 4 * quarter], -1)
    columns, rows = (0, 0, 0, 0), (0, 0, 0, 0, 0, 0)  # the axes that F.pad leaves alone, from the last one on
    moved = (
        F.pad(left[:, :, :-1], (*columns, 1, 0)),
        F.pad(right[:, :, 1:], (*columns, 0, 1)),
        F.pad(above[:, :-1], (*rows, 1, 0)),
        F.pad(below[:, 1:], (*rows, 0, 1)),
    )
    return torch.cat([*moved, rest], -1).flatten(-2).flatten(1, 2)


def shift_patches(x: Tensor, grid: Grid, config: Any, heads: int = 1) -> Tensor:
    """The neighbours that the mixes blend x [B, T, C] with: [B, T, C], by the Q-shift or as `config.shift` says."""
    if config.shift == "q":
        return q_shift(x, grid, heads)
    return F.pad(x[:, :-1], (0, 0, 1, 0)) if config.shift == "previous" else x


def channel_ramps(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For channels i = 0, 1, 2, ...: i / count, i / (count - 1), which ends at 1, and 0, 1, -1, 0, ..."""
    channel = torch.arange(count)
    return channel / count, channel / max(1, count - 1), (channel + 1) % 3 - 1


class ChannelMix(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        c, f = config.n_embd, config.dim_ffn
        self.config, self.heads = config, config.heads
        self.spatial_mix_k, self.spatial_mix_r = (nn.Parameter(torch.zeros(1, 1, c)) for _ in range(2))
        self.key = Linear(c, f)
        self.key_norm = nn.LayerNorm(f) if getattr(config, "key_norm", False) else nn.Identity()
        self.receptance = Linear(c, c)
        self.value = Linear(f, c)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        near = shift_patches(x, grid, self.config, self.heads)
        k = self.key(torch.lerp(near, x, self.spatial_mix_k)).relu_().square()
        y: Tensor = self.value(self.key_norm(k))
        return torch.sigmoid(self.receptance(torch.lerp(near, x, self.spatial_mix_r))) * y


class Block(nn.Module):
    def __init__(self, config: Any, layer: int, spatial_mix: type[nn.Module]):
        super().__init__()
        c = config.n_embd
        self.post_norm = config.post_norm
        self.drop_path: float = config.drop_path * layer / max(1, config.n_layer - 1)
        if layer == 0:
            self.ln0 = nn.LayerNorm(c)
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.att = spatial_mix(config)
        self.ffn = ChannelMix(config)
        if config.init_values is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.zeros(c)) for _ in range(2))
        else:
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self._branch(self.att, self.ln1, self.gamma1, x, grid)
        return x + self._branch(self.ffn, self.ln2, self.gamma2, x, grid)

    def _branch(self, mix: nn.Module, norm: nn.Module, gamma: Tensor | None, x: Tensor, grid: Grid) -> Tensor:
        y: Tensor = norm(mix(x, grid)) if self.post_norm else mix(norm(x), grid)
        if gamma is not None:
            y = gamma * y
        if not self.training or self.drop_path == 0:
            return y
        keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path  # drops the branch for whole pictures
        return y * keep / (1 - self.drop_path)


class Patches(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.projection = nn.Conv2d(3, config.n_embd, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """[B, 3, height, width] -> [B, T, C] and the grid; incomplete patches are padded with zeros."""
        size = self.projection.kernel_size[0]
        height, width = images.shape[2:]
        if height % size or width % size:
            images = F.pad(images, (0, -width % size, 0, -height % size))
        x = self.projection(images)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class VisionModel(Network):
    """`logits = model(images)`: images float [B, 3, height, width], normalised by MEAN and STD (see data/images.py), of
    any size; logits [B, classes], with num_classes = 0 the pooled features [B, C].

    It has the interface of timm's models: `forward_features`, `forward_head`, `forward_intermediates`,
    `get_classifier`, `reset_classifier`, `num_features`.
    """

    SpatialMix: ClassVar[type[nn.Module]]  # the attention, constructed from the configuration
    config_only = ("post_norm", "init_values", "drop_path", "decay_lr", "shift", "causal", "segments")

    def __init__(self, config: Any):
        super().__init__(config)
        self.patch_embed = Patches(config)
        side = config.image_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, config.n_embd))
        self.layers: Any = nn.ModuleList(Block(config, i, self.SpatialMix) for i in range(config.n_layer))
        self.ln1 = nn.LayerNorm(config.n_embd) if config.final_norm else nn.Identity()
        self.head = _head(config)

    @property
    def num_features(self) -> int:
        """The number of channels."""
        n_embd: int = self.config.n_embd
        return n_embd

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The features of every patch after the last norm, [B, C, H, W]."""
        x, grid = self.embed(images)
        for block in self.layers:
            x = self.run_block(block, x, grid)
        return _as_map(self.ln1(x), grid)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H, W] -> logits [B, classes]; with pre_logits, or without a head, [B, C]."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(self, images: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """The outputs of the blocks `indices` (a number: of that many blocks at the end; None: of all), each
        [B, C, H, W]; that of the last block comes after the last norm."""
        number = len(self.layers)
        if indices is None or isinstance(indices, int):
            count = number if indices is None else indices
            if not 0 < count <= number:
                raise InputError(f"this model has {number} blocks, not {count}")
            indices = range(number - count, number)
        for i in indices:
            if not -number <= i < number:
                raise InputError(f"block {i} does not exist: this model has {number}")
        blocks = [i % number for i in indices]
        x, grid = self.embed(images)
        maps = {}
        for i, block in enumerate(self.layers[: max(blocks, default=-1) + 1]):
            x = self.run_block(block, x, grid)
            if i in blocks:
                maps[i] = _as_map(self.ln1(x) if i == number - 1 else x, grid)
        return [maps[i] for i in blocks]

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """The input of the first block, [B, T, C], and the grid of patches."""
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a torch.Tensor [B, 3, height, width], got {show(images)}")
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or not images.is_floating_point():
            what = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise InputError(f"images must be floating point [B, 3, height, width], got {what}")
        self.check_device("images", images)
        x, grid = self.patch_embed(images)
        return self.layers[0].ln0(x + self.positions(grid)), grid

    def positions(self, grid: Grid) -> Tensor:
        """The position embedding for a grid of patches, [1, T, C], interpolated if need be."""
        side = self.config.image_size // self.config.patch_size
        if grid == (side, side):
            return self.pos_embed
        square = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(widen(square), size=grid, mode="bicubic", align_corners=False)
        return resized.to(square.dtype).flatten(2).transpose(1, 2)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one; 0: by none."""
        self.config = replace(self.config, num_classes=num_classes, head_hidden=0)
        self.head = _head(self.config).to(self.pos_embed.device, self.pos_embed.dtype)
        with torch.no_grad():
            _init_linears(self.head)
        self.invalidate_fingerprint()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The released code's "fancy" initialisation."""
        config, c = self.config, self.config.n_embd
        _init_linears(self)
        self.patch_embed.projection.reset_parameters()
        self.pos_embed.zero_()
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)):
            norm.reset_parameters()
        channel = torch.arange(c) / c
        for i, block in enumerate(self.layers):
            rho = i / (config.n_layer - 1) if config.n_layer > 1 else 0.0  # 0 .. 1 over the layers
            tau = 1 - i / config.n_layer  # 1 .. 1 / layers
            for mix in (block.ffn.spatial_mix_k, block.ffn.spatial_mix_r):
                mix.copy_(channel**tau)
            for gamma in (block.gamma1, block.gamma2):
                if gamma is not None:
                    gamma.fill_(config.init_values)
            block.att.init_weights(rho, tau)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay for everything but norms and biases, as in the released recipe; the decays of the attention may
        have a learning rate of their own."""
        norms: set[nn.Parameter] = {
            p for m in self.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm) for p in m.parameters()
        }
        fixed: list[nn.Parameter] = []
        forgetting: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in self.named_parameters():
            if p in norms or name.endswith("bias"):
                fixed.append(p)
            else:
                (forgetting if name.endswith("_decay") else others).append(p)
        faster = self.config.decay_lr  # AdamW multiplies the weight decay by the rate
        return [
            {"params": fixed, "lr": lr, "weight_decay": 0.0},
            {"params": forgetting, "lr": lr * faster, "weight_decay": weight_decay / faster},
            {"params": others, "lr": lr, "weight_decay": weight_decay},
        ]


def _as_map(x: Tensor, grid: Grid) -> Tensor:
    return torch.unflatten(x.transpose(1, 2), 2, grid)


def _head(config: Any) -> nn.Module:
    c, hidden, classes = config.n_embd, config.head_hidden, config.num_classes
    if not classes:
        return nn.Identity()
    if hidden:
        return nn.Sequential(nn.Linear(c, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    return nn.Sequential(OrderedDict(fc=nn.Linear(c, classes)))


def _init_linears(module: nn.Module) -> None:
    for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            linear.bias.zero_()
