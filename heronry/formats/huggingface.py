"""Folders in Hugging Face's layouts: config.json, and the weights as safetensors or .bin.

- RWKV-4 as in transformers' RwkvForCausalLM (RWKV/rwkv-4-*), RWKV-5 and 6 as in the repositories RWKV/rwkv-5-* and
  RWKV/rwkv-6-*: BlinkDL's names with longer words and a prefix
- RWKV-7 as in flash-linear-attention (RWKV/RWKV7-Goose-*): names of its own, low-rank matrices as nn.Linear
- additional names hold what these layouts have no place for: a tuned initial state, the epsilon of a group norm, and
  the notes for LLM ("heronry" in config.json)

Sources: the configuration and model classes of transformers (models/rwkv) and of flash-linear-attention (models/rwkv7).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .lazy_tensor import Tensors, nth, transposed
from .prefixes import strip_prefixes

# model_type -> the class in transformers or in the repository
ARCHITECTURES = {
    "rwkv": "RwkvForCausalLM",
    "rwkv5": "Rwkv5ForCausalLM",
    "rwkv6": "Rwkv6ForCausalLM",
    "rwkv7": "RWKV7ForCausalLM",
}
MODEL_TYPES = {"rwkv4": "rwkv", "rwkv5": "rwkv5", "rwkv6": "rwkv6", "rwkv7": "rwkv7"}

# RWKV-4 to 6: the words of a name, BlinkDL's and Hugging Face's; "rwkv." is in front of all but the head
WORDS = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "time_mix_g": "time_mix_gate",
}

# RWKV-7, outside the layers; "model." is in front of all but the head
FLA = {
    "emb.weight": "embeddings.weight",
    "ln_out.weight": "norm.weight",
    "ln_out.bias": "norm.bias",
    "head.weight": "lm_head.weight",
}
# within a layer, "blocks.i." and "layers.i."
FLA_LAYER = {
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
FLA_FLAT = {  # vectors without the two dimensions of size 1
    "att.k_k": "attn.k_k",
    "att.k_a": "attn.k_a",
    "ffn.x_k": "ffn.x_k",
    **{f"att.{name}0": f"attn.{name}_lora.lora.2.bias" for name in "wav"},
}
FLA_TRANSPOSED = {
    f"att.{name}{i}": f"attn.{name}_lora.lora.{place}.weight" for name in "wavg" for i, place in ((1, 0), (2, 2))
}


def from_blinkdl(tensors: Tensors) -> Tensors:
    """The same tensors under Hugging Face's names."""
    if "blocks.0.att.r_k" not in tensors:
        words = {name: ".".join(WORDS.get(word, word) for word in name.split(".")) for name in tensors}
        return {("" if name == "head.weight" else "rwkv.") + words[name]: x for name, x in tensors.items()}
    renamed: Tensors = {}
    for name, x in tensors.items():
        if name in FLA:
            renamed[("" if name == "head.weight" else "model.") + FLA[name]] = x
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in FLA_TRANSPOSED:
            renamed[prefix + FLA_TRANSPOSED[part]] = x.map(transposed)
        elif part in FLA_FLAT:
            renamed[prefix + FLA_FLAT[part]] = x.map(Tensor.flatten)
        else:
            renamed[prefix + FLA_LAYER[part]] = x
    return renamed


def to_blinkdl(tensors: Tensors, tied: bool = False) -> Tensors:
    """The same tensors under BlinkDL's names; unknown names are kept, without their prefixes.

    tied: the head shares the embedding's weights and may be missing.
    """
    tensors = strip_prefixes(tensors)
    if any(name.startswith("layers.") for name in tensors):
        renamed = _from_fla(tensors)
    else:
        words = {theirs: ours for ours, theirs in WORDS.items()}
        renamed = {".".join(words.get(word, word) for word in name.split(".")): x for name, x in tensors.items()}
    if tied and "emb.weight" in renamed:
        renamed.setdefault("head.weight", renamed["emb.weight"])
    return renamed


def _from_fla(tensors: Tensors) -> Tensors:
    """flash-linear-attention's names of RWKV-7 -> BlinkDL's."""
    outside = {theirs: ours for ours, theirs in FLA.items()}
    inside = {theirs: ours for table in (FLA_LAYER, FLA_FLAT) for ours, theirs in table.items()}
    transposes = {theirs: ours for ours, theirs in FLA_TRANSPOSED.items()}
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


def read_config(hub_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of Hugging Face's in the terms of our configurations; `heronry.load` compares it with the tensors.

    Raises:
        InputError: it specifies something that these models do not have.
    """
    kind = hub_config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"config.json has the model_type {kind!r}; supported are {', '.join(ARCHITECTURES)}")
    fla = kind == "rwkv7"
    epsilon = hub_config.get("norm_eps" if fla else "layer_norm_epsilon", 1e-5)
    if epsilon != 1e-5:
        raise InputError(f"config.json has layer norms with epsilon {epsilon}; all RWKV models have 1e-5")
    if fla and hub_config.get("hidden_act", "sqrelu") != "sqrelu":
        raise InputError("config.json has an activation other than sqrelu, which is not supported")
    if fla and hub_config.get("attn"):
        raise InputError("config.json has attention in some layers, which RWKV-7 does not have")
    sizes = {
        "vocab_size": hub_config.get("vocab_size"),
        "n_layer": hub_config.get("num_hidden_layers"),
        "n_embd": hub_config.get("hidden_size"),
        "dim_att": hub_config.get("attention_hidden_size"),
        "dim_ffn": hub_config.get("intermediate_size"),
        "head_size": hub_config.get("head_dim" if fla else "head_size"),
    }
    if fla:
        sizes |= {f"{ours}_rank": hub_config.get(f"{name}_low_rank_dim") for ours, name in RANKS.items()}
        size = sizes["head_size"]
        # fla's group norm has epsilon head_size * norm_eps
        sizes["ln_x_eps"] = hub_config.get("ln_x_eps", _epsilon(size) if isinstance(size, int) else None)
        sizes["ln0_folded"] = not hub_config.get("norm_first", True)
        if sizes["n_layer"] == 1:
            sizes.pop("value_rank")  # the only layer has none, whatever config.json says
    elif kind != "rwkv":
        sizes |= {ours: hub_config.get(name) for ours, name in VARIANT_KEYS[kind].items()}
        divisor = hub_config.get("head_size_divisor", 8)
        sizes["ln_x_eps"] = _epsilon(divisor * divisor) if isinstance(divisor, int | float) else None
    if kind in ("rwkv", "rwkv7"):
        sizes.pop("head_size" if kind == "rwkv" else "dim_att")
    if hub_config.get("time_state"):
        sizes["time_state"] = True
    config = {"model": next(name for name, model_type in MODEL_TYPES.items() if model_type == kind)}
    config |= {key: value for key, value in sizes.items() if value is not None}
    return config | dict(hub_config.get("heronry") or {})


# additional keys: the hub's RWKV-5 and 6 are of one variant each, so their config.json does not name it
VARIANT_KEYS = {
    "rwkv5": {"version": "version", "log_bonus": "log_bonus"},
    "rwkv6": {"mix_rank": "time_mix_extra_dim", "decay_rank": "time_decay_extra_dim"},
}
RANKS = {"decay": "decay", "iclr": "a", "value": "v", "gate": "gate"}


def _epsilon(factor: float) -> float:
    """`factor` * 1e-5; exactly the literal 64e-5 for the factor of all published models."""
    return 64e-5 if factor == 64 else factor * 1e-5


def config_json(name: str, config: Any, notes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of Hugging Face's for a model. name: "rwkv4" ...; config: its configuration."""
    kind = MODEL_TYPES[name]
    hub_config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "intermediate_size": config.dim_ffn,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "rwkv7":
        hub_config |= {
            "head_dim": config.head_size,
            "num_heads": config.dim_att // config.head_size,
            "value_dim": [config.dim_att] * config.n_layer,
            **{f"{name}_low_rank_dim": getattr(config, f"{ours}_rank") for ours, name in RANKS.items()},
            "hidden_act": "sqrelu",
            "norm_first": not config.ln0_folded,  # whether the first layer has ln0
            "norm_bias": True,
            "norm_eps": 1e-5,
            "fuse_norm": False,
            "max_position_embeddings": 2048,  # of training; not a limit
        }
        if config.ln_x_eps != _epsilon(config.head_size):
            hub_config["ln_x_eps"] = config.ln_x_eps
    else:
        hub_config |= {
            "attention_hidden_size": config.dim_att,
            "layer_norm_epsilon": 1e-5,
            "rescale_every": 6,  # those classes halve activations so that float16 does not overflow; ours need not
            "context_length": 1024 if kind == "rwkv" else 4096,
        }
        if kind != "rwkv":
            divisor = 8 if config.ln_x_eps == 64e-5 else (config.ln_x_eps / 1e-5) ** 0.5
            hub_config |= {"head_size": config.head_size, "head_size_divisor": divisor}
            hub_config |= {"num_attention_heads": config.dim_att // config.head_size}
            hub_config |= {name: getattr(config, ours) for ours, name in VARIANT_KEYS[kind].items()}
    hub_config |= {"time_state": True} if config.time_state else {}
    return hub_config | ({"heronry": dict(notes)} if notes else {})
