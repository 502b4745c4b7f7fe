"""RWKV-6 in flash-linear-attention's layout, which is only read: BlinkDL's matrices under the names of modules.

- vectors are flat, low-rank matrices are nn.Linear, and the five mixes are in the order r, w, k, v, g
- the epsilon of the norm after the recurrence is norm_eps itself, also where the weights are BlinkDL's, which were made
  with 64e-5: then give ln_x_eps

Sources: the layer, the model, and the conversion from RWKV/rwkv-6-* of flash-linear-attention (layers/rwkv6.py,
models/rwkv6, utils/convert_from_rwkv6.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, show
from .huggingface import tie_head
from .lazy_tensor import LazyTensor, Tensors, nth, transposed
from .prefixes import strip_prefixes

OUTSIDE = {
    "embeddings.weight": "emb.weight",
    "norm.weight": "ln_out.weight",
    "norm.bias": "ln_out.bias",
    "lm_head.weight": "head.weight",
}
ALONE = {"model": "rwkv6", "ln_x_eps": 1e-5}  # the config of a file without its config.json
ORDER = "rwkvg"  # of the mixes; BlinkDL's is w, k, v, r, g


def _reordered(x: LazyTensor) -> LazyTensor:
    """Five mixes in fla's order, [5 D, C] -> in BlinkDL's, [5, D, C]."""
    mixes = x.map(lambda x: torch.unflatten(x, 0, (5, -1)))
    return LazyTensor.deferred(mixes.shape, x.dtype, lambda x: x[[ORDER.index(mix) for mix in "wkvrg"]], mixes)


def _vector(x: Tensor) -> Tensor:
    """[C] -> [1, 1, C]."""
    return x.reshape(1, 1, -1)


# within a layer, "layers.i." and "blocks.i."; for tensors that change, how
INSIDE: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {
    **{f"pre_norm.{x}": (f"ln0.{x}", None) for x in ("weight", "bias")},
    **{f"attn_norm.{x}": (f"ln1.{x}", None) for x in ("weight", "bias")},
    **{f"ffn_norm.{x}": (f"ln2.{x}", None) for x in ("weight", "bias")},
    **{f"attn.g_norm.{x}": (f"att.ln_x.{x}", None) for x in ("weight", "bias")},
    "attn.x_proj.0.mu": ("att.time_maa_x", _vector),
    "attn.r_proj.linear.weight": ("att.receptance.weight", None),
    "attn.k_proj.linear.weight": ("att.key.weight", None),
    "attn.v_proj.linear.weight": ("att.value.weight", None),
    "attn.g_proj.linear.weight": ("att.gate.weight", None),
    "attn.o_proj.weight": ("att.output.weight", None),
    "attn.w_proj.linear.lora.0.weight": ("att.time_decay_w1", transposed),
    "attn.w_proj.linear.lora.2.weight": ("att.time_decay_w2", transposed),
    "attn.w_proj.linear.lora.2.bias": ("att.time_decay", _vector),
    "attn.bonus": ("att.time_faaaa", None),
    "ffn.key.linear.weight": ("ffn.key.weight", None),
    "ffn.key.mu": ("ffn.time_maa_k", _vector),
    "ffn.receptance.linear.weight": ("ffn.receptance.weight", None),
    "ffn.receptance.mu": ("ffn.time_maa_r", _vector),
    "ffn.value.weight": ("ffn.value.weight", None),
}


def is_fla_rwkv6(names: Iterable[str]) -> bool:
    """Whether these names, prefixes removed, are those of an RWKV-6 of flash-linear-attention's."""
    return "layers.0.attn.x_bias" in set(names)


def to_blinkdl(tensors: Tensors, tied: Any = False) -> Tensors:
    """The same tensors under BlinkDL's names; unknown names are kept, without their prefixes.

    tied: see `tie_head`.
    """
    renamed: Tensors = {}
    for name, x in strip_prefixes(tensors).items():
        layer, _, part = name.removeprefix("layers.").partition(".")
        if name in OUTSIDE:
            renamed[OUTSIDE[name]] = x
        elif part == "attn.x_bias":
            for i, mix in enumerate(ORDER):
                renamed[f"blocks.{layer}.att.time_maa_{mix}"] = x.map(partial(nth, i, len(ORDER)))
        elif part == "attn.x_proj.0.linear.weight":  # [5 D, C] -> [C, 5 D]
            renamed[f"blocks.{layer}.att.time_maa_w1"] = _reordered(x).map(lambda x: x.flatten(0, 1).T)
        elif part == "attn.x_proj.2.weight":  # [C, 5 D] -> [5, D, C]
            renamed[f"blocks.{layer}.att.time_maa_w2"] = _reordered(x.map(transposed))
        elif part in INSIDE:
            ours, change = INSIDE[part]
            renamed[f"blocks.{layer}.{ours}"] = x.map(change) if change else x
        else:
            renamed[name] = x
    return tie_head(renamed, tied)


def read_config(hub_config: Mapping[str, Any]) -> dict[str, Any]:
    """Its config.json in the terms of heronry's configurations.

    Raises:
        InputError: it specifies something that an RWKV-6 does not have.
    """
    for key, only in (("expand_k", 1), ("expand_v", 1), ("hidden_act", "sqrelu"), ("norm_first", True), ("attn", None)):
        default = 0.5 if key == "expand_k" else only
        if hub_config.get(key, default) != only:
            raise InputError(f"config.json says {key} = {show(hub_config.get(key, default))}; supported is only {only}")
    sizes = {
        "vocab_size": hub_config.get("vocab_size"),
        "n_layer": hub_config.get("num_hidden_layers"),
        "n_embd": hub_config.get("hidden_size"),
        "dim_ffn": hub_config.get("intermediate_size"),
        "mix_rank": hub_config.get("proj_low_rank_dim"),
        "decay_rank": hub_config.get("gate_low_rank_dim"),
    }
    width, heads = hub_config.get("hidden_size"), hub_config.get("num_heads")
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        sizes["head_size"] = width // heads
    epsilon = hub_config.get("norm_eps", 1e-5)
    if epsilon != 1e-5:
        raise InputError(f"config.json has layer norms with epsilon {show(epsilon)}; all RWKV models have 1e-5")
    config = {key: value for key, value in sizes.items() if value is not None}
    return {"model": "rwkv6", **config, "ln_x_eps": epsilon}
