"""Vision-RWKV's published checkpoints: .pth files of mmpretrain and mmsegmentation.

What is ours is theirs without "backbone."; the head's names are the same ("head.fc.*", of L "head.0.*" and "head.2.*").
The tensors lie in the file under "state_dict" (L: "model"), which read_pth opens.
"""

from __future__ import annotations

from .lazy_tensor import Tensors

PREFIX = "backbone."


def is_vision_rwkv(tensors: Tensors) -> bool:
    return f"{PREFIX}patch_embed.projection.weight" in tensors


def to_ours(tensors: Tensors) -> Tensors:
    return {name.removeprefix(PREFIX): x for name, x in tensors.items()}


def from_ours(tensors: Tensors) -> Tensors:
    """Under the names that the authors' own code loads."""
    return {name if name.startswith("head.") else PREFIX + name: x for name, x in tensors.items()}
