"""The recurrences of RWKV. One folder an operator; every body of it behind one function.

Nothing here knows of models. Activations are [B, T, H, N], states [B, H, N_v, N_k] in float32 (float64 for
float64 activations), decays are given as their logarithm. RWKV-4 has no heads: [B, T, A] and [B, 3, A]. The two of
Vision-RWKV read a picture in both directions at once and have no state to go on from.
"""

from .biwkv import biwkv
from .biwkv6 import biwkv6
from .wkv4 import wkv4
from .wkv5 import wkv5
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = ["biwkv", "biwkv6", "wkv4", "wkv5", "wkv6", "wkv7"]
