"""The generations, one file each, and Vision-RWKV."""

from .base import Model, Network
from .registry import MODELS, VISION_MODELS, detect
from .rwkv4 import RWKV4, RWKV4Config
from .rwkv5 import RWKV5, RWKV5Config
from .rwkv6 import RWKV6, RWKV6Config
from .rwkv7 import RWKV7, RWKV7Config
from .state import Context, LayerState, State
from .vision import VRWKV, VRWKV6, VisionModel

__all__ = [
    "MODELS",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "VISION_MODELS",
    "VRWKV",
    "VRWKV6",
    "Context",
    "LayerState",
    "Model",
    "Network",
    "RWKV4Config",
    "RWKV5Config",
    "RWKV6Config",
    "RWKV7Config",
    "State",
    "VisionModel",
    "detect",
]
