"""Vision-RWKV's published checkpoints: .pth files of mmpretrain and mmsegmentation.

heronry's names are these without "backbone."; the names of the head are the same ("head.fc.*", in the large variant
"head.0.*" and "head.2.*"). The tensors are stored under "state_dict" (large: "model"), which pth.py opens.

Checkpoints of segmentation and detection (VRWKV-Adapter) hold the backbone, without its last norm, among convolutions,
deformable attention and heads, which are left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from .lazy_tensor import Tensors

T = TypeVar("T")  # Tensor or LazyTensor

PREFIX = "backbone."
BACKBONE = ("patch_embed", "pos_embed", "layers", "ln1")  # its parts; those of VRWKV-Adapter are beside them
# parts by which a checkpoint of segmentation or detection is known
DENSE = (
    "decode_head",
    "auxiliary_head",
    "neck",
    "rpn_head",
    "roi_head",
    "bbox_head",
    "mask_head",
    "spm",
    "interactions",
)

log = logging.getLogger("heronry")


def is_vision_rwkv(tensors: Tensors) -> bool:
    """Whether the names are those of a published checkpoint."""
    return f"{PREFIX}patch_embed.projection.weight" in tensors


def is_dense(names: Iterable[str]) -> bool:
    """Whether these are names of a segmentation or detection checkpoint."""
    return any(_foreign_part(name) in DENSE for name in names)


def to_heronry(tensors: Tensors) -> Tensors:
    """The same tensors under the names of heronry.models.vision; those of a dense prediction are left out, which is
    logged."""
    others = Counter(_foreign_part(name) for name in tensors)
    left_out = sorted(others.keys() - {"", "head"}) if is_dense(tensors) else []
    if left_out:
        number = sum(others[part] for part in left_out)
        log.warning(f"heronry: the backbone is read, without {number} other tensors ({', '.join(left_out)})")
    return {name.removeprefix(PREFIX): x for name, x in tensors.items() if _foreign_part(name) not in left_out}


def _foreign_part(name: str) -> str:
    """The part of a checkpoint that a tensor belongs to: "decode_head", "spm", "head"; "" for the backbone itself."""
    part = name.removeprefix(PREFIX).partition(".")[0]
    return "" if name.startswith(PREFIX) and part in BACKBONE else part


def from_heronry(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors under the names that the authors' code loads."""
    return {name if name.startswith("head.") else PREFIX + name: x for name, x in tensors.items()}
