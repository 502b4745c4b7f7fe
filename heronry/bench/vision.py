"""The topic "vision": vision models beside a ViT of equal size."""

from __future__ import annotations

from typing import Any

import torch

from ..models.baselines import ViT, ViTConfig
from ..models.native_step import has_fast_matmul
from ..models.vision import create
from .contest import Contest, Row
from .contestants import Job
from .worker import Contestant

MODELS = {"ViT-T": "vit", "VRWKV-T": "vrwkv_tiny", "VRWKV6-T": "vrwkv6_tiny"}


class VisionInference:
    """A model of the size T (192 channels, 12 layers) on a batch of pictures of size x size pixels.

    Each size is a contestant with a process of its own, so that memory is measured for each.
    """

    def __init__(self, name: str, dtype: str, batch: int, size: int):
        self.name, self.dtype = name, getattr(torch, dtype)
        self.shape = (batch, 3, size, size)

    def load(self) -> None:
        self.model: Any = ViT(ViTConfig(192, 12, 768)) if self.name == "vit" else create(self.name)
        self.model.init_weights()
        self.model.to(self.dtype).eval()

    def forward(self) -> Job:
        images = torch.randn(self.shape).to(self.dtype)

        @torch.inference_mode()
        def job() -> None:
            self.model(images)

        return job


def vision(quick: bool, large: bool) -> list[Contest]:
    """Inference at several sizes of pictures and batches."""
    contests = []
    for batch, size in ((1, 224), (8, 224), (1, 512), (1, 1024), *(() if quick else ((1, 2048),))):
        rows = []
        for dtype in ("bfloat16", "float32") if has_fast_matmul(torch.bfloat16) else ("float32",):
            for name, model in MODELS.items():
                contestant = Contestant(VisionInference, (model, dtype, batch, size))
                against = () if model == "vit" else (f"ViT-T {dtype}",)
                units = batch * (size // 16) ** 2
                rows.append(Row(f"{name} {dtype}", contestant, "forward", units=units, against=against))
        title = f"{batch} x {size} x {size} pixels, {(size // 16) ** 2:,} patches each"
        contests.append(Contest("vision", title, "patch", rows, blocks=9 if size < 1024 else 3, memory=True))
    return contests
