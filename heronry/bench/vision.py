"""Models of pictures beside a ViT of equal size: one function a topic, and its contestant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models.baselines import ViT, ViTConfig
from ..models.native_step import has_fast_matmul
from ..models.vision import create
from .contest import Contest, Row
from .worker import Contestant

NAMES = {"ViT-T": "vit", "VRWKV-T": "vrwkv_tiny", "VRWKV6-T": "vrwkv6_tiny"}


class Seeing:
    """A model of the size T, 192 channels in 12 layers, in front of pictures of size x size pixels.

    Each size has a process of its own, whose memory is that of this size.
    """

    def __init__(self, name: str, dtype: str, batch: int, size: int):
        self.name, self.dtype = name, getattr(torch, dtype)
        self.shape = (batch, 3, size, size)

    def load(self) -> None:
        self.model: Any = ViT(ViTConfig(192, 12, 768)) if self.name == "vit" else create(self.name)
        self.model.init_weights()
        self.model.to(self.dtype).eval()

    def forward(self) -> Callable[[], object]:
        images = torch.randn(self.shape).to(self.dtype)

        @torch.inference_mode()
        def job() -> None:
            self.model(images)

        return job


def vision(quick: bool, large: bool) -> list[Contest]:
    contests = []
    for batch, size in ((1, 224), (8, 224), (1, 512), (1, 1024), *(() if quick else ((1, 2048),))):
        rows = []
        for dtype in ("bfloat16", "float32") if has_fast_matmul(torch.bfloat16) else ("float32",):
            for name, made in NAMES.items():
                contestant = Contestant(Seeing, (made, dtype, batch, size))
                against = () if made == "vit" else (f"ViT-T {dtype}",)
                units = batch * (size // 16) ** 2
                rows.append(Row(f"{name} {dtype}", contestant, "forward", units=units, against=against))
        title = f"{batch} x {size} x {size} pixels, {(size // 16) ** 2:,} patches each"
        contests.append(Contest("vision", title, "patch", rows, blocks=9 if size < 1024 else 3, memory=True))
    return contests
