"""The recurrences of RWKV. One folder an operator; every body of it behind one function.

Nothing here knows of models. Activations are [B, T, H, N], states [B, H, N_v, N_k] in float32 (float64 for
float64 activations), decays are given as their logarithm. RWKV-4 has no heads: [B, T, A] and [B, 3, A].
"""

from .wkv4 import wkv4
from .wkv5 import wkv5
from .wkv6 import wkv6
from .wkv7 import wkv7

__all__ = ["wkv4", "wkv5", "wkv6", "wkv7"]
