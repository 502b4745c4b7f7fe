"""Dense prediction with Vision-RWKV: a feature pyramid for detectors, and a segmenter on top of it. Plain torch.

- the pyramid is ViTDet's: all four scales are computed from the last map alone, by transposed convolutions upwards and
  by pooling downwards. The blocks of a plain backbone have one stride, so that maps of earlier blocks, which an FPN or
  UperNet over a ViT takes for its fine scales, are no finer than the last; ViTDet found them to add nothing
- norms go over the channels at each position: pictures of a batch are independent, batches of one can be trained on,
  and there are no statistics to freeze
- maps cover the picture padded to whole patches; results are cropped back to the picture, never resized to it
Sources: "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet, arXiv 2203.16527), "Unified
Perceptual Parsing for Scene Understanding" (UperNet, arXiv 1807.10221).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from .model import VisionModel

BINS = (1, 2, 3, 6)  # rows and columns of each level of the pyramid pooling


class Norm(nn.LayerNorm):
    """A layer norm over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scales(nn.ModuleDict):
    """One map [B, size_in, H, W] -> an OrderedDict "0" to "3" of maps of `channels` channels: 4 times and twice as
    large, the same size, half as large. `wanted`: which of them to compute."""

    def __init__(self, size_in: int, channels: int, wanted: Iterable[int] = range(4)):
        if size_in < 4 or channels < 1:
            raise InputError(f"a pyramid makes 1 or more channels of 4 or more, got {channels} of {size_in}")
        half, quarter = size_in // 2, size_in // 4

        def doubled(before: int, after: int) -> nn.Module:
            return nn.ConvTranspose2d(before, after, 2, 2)

        def out(before: int) -> list[nn.Module]:
            first, second = _convolution(before, channels, 1), _convolution(channels, channels, 3)
            return [first, Norm(channels), second, Norm(channels)]

        layers = (
            [doubled(size_in, half), Norm(half), nn.GELU(), doubled(half, quarter), *out(quarter)],
            [doubled(size_in, half), *out(half)],
            out(size_in),
            [nn.MaxPool2d(2, ceil_mode=True), *out(size_in)],  # keeps the last row of an odd number
        )
        super().__init__({str(i): nn.Sequential(*layers[i]) for i in wanted})

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, scale(x)) for name, scale in self.items())

    def init_weights(self) -> None:
        """torch's own initialisation, as in the constructor; the norms that follow set the scale."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm):
                module.reset_parameters()


class Pyramid(nn.Module):
    """Images [B, 3, height, width] of any size -> an OrderedDict "0" to "3" of maps [B, out_channels, H, W] of strides
    patch / 4, patch / 2, patch and 2 patch: 4, 8, 16 and 32 pixels.

    This is the interface that torchvision's detectors expect of their `backbone`. The VisionModel inside needs no head
    (num_classes=0); the pyramid never uses one.
    """

    def __init__(self, backbone: VisionModel, channels: int = 256):
        super().__init__()
        self.backbone = backbone
        self.scales = Scales(backbone.num_features, channels).to(backbone.pos_embed)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = self.scales(self.backbone.forward_features(images))
        return maps


class Segmenter(nn.Module):
    """Images [B, 3, height, width] of any size -> logits [B, classes, height, width], over a pyramid, as UperNet.

    UperNet's lateral convolutions are left out: the pyramid has already applied convolutions to each map.

    Args:
        backbone: without a head (num_classes=0). It is `segmenter.pyramid.backbone`, and is trained with the rest.
        channels: of the pyramid and of all maps of the head; UperNet has 512.
    """

    def __init__(self, backbone: VisionModel, classes: int, channels: int = 256):
        super().__init__()
        if classes < 1:
            raise InputError(f"classes must be at least 1, got {classes}")
        self.pyramid = Pyramid(backbone, channels)
        self.pooled = nn.ModuleList(_activated(channels, channels, 1) for _ in BINS)
        self.top = _activated((1 + len(BINS)) * channels, channels, 3)
        self.smooth = nn.ModuleList(_activated(channels, channels, 3) for _ in range(3))
        self.fuse = _activated(4 * channels, channels, 3)
        self.classes = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.classes.weight, std=0.01)  # all classes are initially about equally likely
        nn.init.zeros_(self.classes.bias)  # type: ignore[arg-type]
        self.to(backbone.pos_embed)

    def forward(self, images: Tensor) -> Tensor:
        maps = list(self.pyramid(images).values())
        patch = self.pyramid.backbone.config.patch_size
        height, width = (patch * side for side in maps[2].shape[2:])
        maps[3] = self.top(torch.cat([maps[3], *self._pooled(maps[3])], 1))
        for i in (2, 1, 0):
            maps[i] = maps[i] + _enlarged(maps[i + 1], 2, maps[i])
        maps = [smooth(x) for smooth, x in zip(self.smooth, maps[:3], strict=True)] + maps[3:]
        fused = self.fuse(torch.cat([_enlarged(x, 2**i, maps[0]) for i, x in enumerate(maps)], 1))
        logits = F.interpolate(self.classes(fused), (height, width), mode="bilinear")
        return logits[..., : images.shape[2], : images.shape[3]]

    def _pooled(self, x: Tensor) -> list[Tensor]:
        """The means over 1, 2 x 2, 3 x 3 and 6 x 6 parts of the map, each resized to the size of the map."""
        size = x.shape[2:]
        means = (F.adaptive_avg_pool2d(x, bins) for bins in BINS)
        return [F.interpolate(f(y), size, mode="bilinear") for f, y in zip(self.pooled, means, strict=True)]


def _enlarged(x: Tensor, factor: int, like: Tensor) -> Tensor:
    """x, `factor` times as large, cropped to the size of `like`."""
    if factor > 1:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear")
    return x[..., : like.shape[2], : like.shape[3]]


def _convolution(before: int, after: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, bias=False)


def _activated(before: int, after: int, size: int) -> nn.Sequential:
    return nn.Sequential(_convolution(before, after, size), Norm(after), nn.ReLU())
