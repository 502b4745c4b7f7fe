"""flash-linear-attention's layout of RWKV-7 (RWKV/RWKV7-Goose-*): names of its own, low-rank matrices as nn.Linear.

Source: the model class of flash-linear-attention (models/rwkv7).
"""

from __future__ import annotations

import re
from functools import partial

from torch import Tensor

from .lazy_tensor import Tensors, nth, transposed

# outside the layers; "model." is in front of all but the head
OUTSIDE = {
    "emb.weight": "embeddings.weight",
    "ln_out.weight": "norm.weight",
    "ln_out.bias": "norm.bias",
    "head.weight": "lm_head.weight",
}
# within a layer, "blocks.i." and "layers.i."
INSIDE = {
    "ln0.weight": "pre_norm.weight",
    "ln0.bias": "pre_norm.bias",
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "ffn_norm.weight",
    "ln2.bias": "ffn_norm.bias",
    **{f"att.x_{name}": f"attn.x_{name}" for name in "rwkvag"},
    "att.receptance.weight": "attn.r_proj.weight",
    "att.key.weight": "attn.k_proj.weight",
    "att.value.weight": "attn.v_proj.weight",
    "att.output.weight": "attn.o_proj.weight",
    "att.ln_x.weight": "attn.g_norm.weight",
    "att.ln_x.bias": "attn.g_norm.bias",
    "att.r_k": "attn.r_k",
    "att.time_state": "attn.time_state",
    "ffn.key.weight": "ffn.key.weight",
    "ffn.value.weight": "ffn.value.weight",
}
FLAT = {  # vectors without the two dimensions of size 1
    "att.k_k": "attn.k_k",
    "att.k_a": "attn.k_a",
    "ffn.x_k": "ffn.x_k",
    **{f"att.{name}0": f"attn.{name}_lora.lora.2.bias" for name in "wav"},
}
TRANSPOSED = {
    f"att.{name}{i}": f"attn.{name}_lora.lora.{place}.weight" for name in "wavg" for i, place in ((1, 0), (2, 2))
}


def has_place_for(name: str) -> bool:
    """Whether a tensor with this name of BlinkDL's is part of an RWKV-7, which this layout holds."""
    part = re.sub(r"^blocks\.\d+\.", "", name)
    return name in OUTSIDE or (part != name and any(part in table for table in (INSIDE, FLAT, TRANSPOSED)))


def is_fla(tensors: Tensors) -> bool:
    """Whether these are its names, without the prefix "model."."""
    return any(name.startswith("layers.") for name in tensors)


def from_blinkdl(tensors: Tensors) -> Tensors:
    """The same tensors under flash-linear-attention's names."""
    renamed: Tensors = {}
    for name, x in tensors.items():
        if name in OUTSIDE:
            renamed[("" if name == "head.weight" else "model.") + OUTSIDE[name]] = x
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in TRANSPOSED:
            renamed[prefix + TRANSPOSED[part]] = x.map(transposed)
        elif part in FLAT:
            renamed[prefix + FLAT[part]] = x.map(Tensor.flatten)
        else:
            renamed[prefix + INSIDE[part]] = x
    return renamed


def to_blinkdl(tensors: Tensors) -> Tensors:
    """The same tensors under BlinkDL's names; unknown names are kept."""
    outside = {theirs: ours for ours, theirs in OUTSIDE.items()}
    inside = {theirs: ours for table in (INSIDE, FLAT) for ours, theirs in table.items()}
    transposes = {theirs: ours for ours, theirs in TRANSPOSED.items()}
    renamed: Tensors = {}
    for name, x in tensors.items():
        layer, _, part = name.removeprefix("layers.").partition(".")
        prefix = f"blocks.{layer}."
        if name in outside:
            renamed[outside[name]] = x
        elif part == "attn.x_x":  # repositories of early 2025 have the six mixes as one tensor
            for i, mix in enumerate("rwkvag"):
                renamed[f"{prefix}att.x_{mix}"] = x.map(partial(nth, i, 6))
        elif part in transposes:
            renamed[prefix + transposes[part]] = x.map(transposed)
        else:
            renamed[prefix + inside[part] if part in inside else name] = x
    return renamed
