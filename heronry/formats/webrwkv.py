"""web-rwkv's .st files: safetensors in float16, with BlinkDL's names, but for three words, and with the matrices W of
products x W (the low-rank ones) and tuned states transposed.

Source: convert_safetensors.py of web-rwkv.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from .lazy_tensor import Tensors, transposed

TRANSPOSED = (
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    *(f"att.{name}{i}" for name in "wavg" for i in (1, 2)),
    "att.time_state",
)


def from_blinkdl(tensors: Tensors) -> Tensors:
    """The same tensors under web-rwkv's names.

    RWKV-5.1 becomes 5.2 with equal decays within a head, because web-rwkv supports no other; it does not support 5.0.
    """
    is_v5 = "blocks.0.att.ln_x.weight" in tensors and "blocks.0.att.time_mix_k" in tensors
    if is_v5 and "blocks.0.att.gate.weight" not in tensors:
        raise InputError("web-rwkv does not support RWKV-5.0")
    renamed: Tensors = {}
    for name, x in tensors.items():
        if name.endswith(TRANSPOSED) and len(x.shape) >= 2:
            x = x.map(transposed)
        if is_v5 and name.endswith(("att.time_decay", "att.time_faaaa")) and x.shape[1:].numel() == 1:
            head_size = tensors["blocks.0.att.key.weight"].shape[0] // x.shape[0]
            x = x.map(partial(_repeat_per_channel, head_size))
        renamed[name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")] = x
    return renamed


def is_webrwkv(tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file with BlinkDL's main names is one of web-rwkv's.

    Raises:
        InputError: it may be either, and the two would be read as different models.
    """
    is_half = all(x.dtype == torch.float16 for x in tensors.values())
    if all(name.endswith(".att.time_state") for name in tensors):
        # a tuned state, with the names and shapes of BlinkDL's: other tuners do not use float16, nor this format
        # nor is there web-rwkv's for RWKV-4, whose states are no matrices
        is_matrix = all(len(x.shape) == 3 for x in tensors.values())
        return is_half and is_matrix and not metadata.get("format", "").startswith("heronry.")
    if "blocks.0.att.time_mix_x" in tensors:  # RWKV-6
        return True
    if "blocks.0.att.gate.weight" in tensors:  # RWKV-5: BlinkDL has time_first in 5.0 only, which has no gate
        return "blocks.0.att.time_first" in tensors
    if "blocks.0.att.w1" in tensors and "blocks.0.ln1.weight" in tensors:  # RWKV-7
        width = tensors["blocks.0.ln1.weight"].numel()
        shapes = [x.shape for name, x in tensors.items() if re.search(r"\.att\.[wavg]1$", name)]
        if is_half and all(shape == (width, width) for shape in shapes):
            raise InputError(
                "its low-rank matrices are square, so nothing shows whether this is BlinkDL's layout or web-rwkv's"
            )
        return any(shape[0] != width and shape[-1] == width for shape in shapes)
    return False


def to_blinkdl(tensors: Tensors) -> Tensors:
    """The same tensors under BlinkDL's names."""
    is_v6 = "blocks.0.att.time_mix_x" in tensors
    renamed: Tensors = {}
    for name, x in tensors.items():
        if "blocks.0.att.gate.weight" in tensors:
            name = name.replace("att.time_first", "att.time_faaaa")
        if is_v6:
            name = name.replace("time_mix", "time_maa")
        renamed[name] = x.map(transposed) if name.endswith(TRANSPOSED) and len(x.shape) >= 2 else x
    return renamed


def _repeat_per_channel(head_size: int, x: Tensor) -> Tensor:
    """[H] -> [H, N], equal within a head."""
    return x.reshape(-1, 1).expand(-1, head_size)
