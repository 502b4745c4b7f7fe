"""Vision-RWKV: model.py has the two kinds, variants.py the published sizes by name."""

from .model import (
    MEAN,
    SHIFTS,
    STD,
    VRWKV,
    VRWKV6,
    Block,
    Grid,
    SpatialMix,
    SpatialMix6,
    VisionModel,
    VRWKV6Config,
    VRWKVConfig,
    q_shift,
    shifted,
)
from .variants import VARIANTS, create

__all__ = [
    "MEAN",
    "SHIFTS",
    "STD",
    "VARIANTS",
    "VRWKV",
    "VRWKV6",
    "Block",
    "Grid",
    "SpatialMix",
    "SpatialMix6",
    "VRWKV6Config",
    "VRWKVConfig",
    "VisionModel",
    "create",
    "q_shift",
    "shifted",
]
