"""Vision-RWKV: vrwkv.py and vrwkv6.py have the two kinds, model.py what they share, variants.py the published sizes."""

from .model import MEAN, SHIFTS, STD, Block, Grid, VisionModel, q_shift, shift_patches
from .variants import VARIANTS, create
from .vrwkv import VRWKV, SpatialMix, VRWKVConfig
from .vrwkv6 import VRWKV6, SpatialMix6, VRWKV6Config

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
    "shift_patches",
]
