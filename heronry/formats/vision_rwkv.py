"""Vision-RWKV's published checkpoints: .pth files of mmpretrain and mmsegmentation.

heronry's names are these without "backbone."; the names of the head are the same ("head.fc.*", in the large variant
"head.0.*" and "head.2.*"). The tensors are stored under "state_dict" (large: "model"), which pth.py opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from .lazy_tensor import Tensors

T = TypeVar("T")  # Tensor or LazyTensor

PREFIX = "backbone."


def is_vision_rwkv(tensors: Tensors) -> bool:
    """Whether the names are those of a published checkpoint."""
    return f"{PREFIX}patch_embed.projection.weight" in tensors


def to_heronry(tensors: Tensors) -> Tensors:
    """The same tensors under the names of heronry.models.vision."""
    return {name.removeprefix(PREFIX): x for name, x in tensors.items()}


def from_heronry(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under the names that the authors' code loads."""
    return {name if name.startswith("head.") else PREFIX + name: x for name, x in tensors.items()}
