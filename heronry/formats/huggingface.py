"""Folders in Hugging Face's layouts: config.json, and the weights as safetensors or .bin.

- RWKV-4 as transformers' RwkvForCausalLM has it (RWKV/rwkv-4-*), RWKV-5 and 6 as the repositories RWKV/rwkv-5-* and
  RWKV/rwkv-6-* do: BlinkDL's names with longer words and a prefix
- RWKV-7 as flash-linear-attention has it (RWKV/RWKV7-Goose-*): names of its own, low-rank matrices as nn.Linear
- what these have no place for is written under a name of the same kind, which others leave out: a tuned initial state,
  the constant of a group norm, and what LLM should know ("heronry" in config.json)
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

# model_type -> the class that transformers should make of it
ARCHITECTURES = {
    "rwkv": "RwkvForCausalLM",
    "rwkv5": "Rwkv5ForCausalLM",
    "rwkv6": "Rwkv6ForCausalLM",
    "rwkv7": "RWKV7ForCausalLM",
}
MODEL_TYPES = {"rwkv4": "rwkv", "rwkv5": "rwkv5", "rwkv6": "rwkv6", "rwkv7": "rwkv7"}

# RWKV-4 to 6: what a name consists of, ours and theirs
WORDS = {
    "emb": "rwkv.embeddings",
    "blocks": "rwkv.blocks",
    "ln_out": "rwkv.ln_out",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "time_mix_g": "time_mix_gate",
}

# RWKV-7, outside the layers
FLA = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
# and in one, "blocks.i." and "model.layers.i."
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
    """The same under Hugging Face's names."""
    if "blocks.0.att.r_k" not in tensors:
        return {".".join(WORDS.get(word, word) for word in name.split(".")): x for name, x in tensors.items()}
    made: Tensors = {}
    for name, x in tensors.items():
        if name in FLA:
            made[FLA[name]] = x
            continue
        _, layer, part = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if part in FLA_TRANSPOSED:
            made[prefix + FLA_TRANSPOSED[part]] = x.map(transposed)
        elif part in FLA_FLAT:
            made[prefix + FLA_FLAT[part]] = x.map(Tensor.flatten)
        else:
            made[prefix + FLA_LAYER[part]] = x
    return made


def to_blinkdl(tensors: Tensors, tied: bool = False) -> Tensors:
    """The same under BlinkDL's names; what is not known keeps its own.

    tied: the head shares the embedding's weights and may be left out.
    """
    if "embeddings.weight" in tensors:  # of a base model, which is saved without the name it has in one with a head
        whole = "model" if "layers.0.attn.r_k" in tensors else "rwkv"
        tensors = {f"{whole}.{name}": x for name, x in tensors.items()}
    if "model.layers.0.attn.r_k" in tensors:
        made = _from_fla(tensors)
    else:
        made = {}
        words = {theirs: ours for ours, theirs in WORDS.items()}
        for name, x in tensors.items():
            head, _, rest = name.partition(".")
            if head == "rwkv":
                first, _, rest = rest.partition(".")
                head = f"rwkv.{first}"
            made[".".join(words.get(word, word) for word in (head, *rest.split(".")))] = x
    if tied and "emb.weight" in made:
        made.setdefault("head.weight", made["emb.weight"])
    return made


def _from_fla(tensors: Tensors) -> Tensors:
    outside = {theirs: ours for ours, theirs in FLA.items()}
    inside = {theirs: ours for table in (FLA_LAYER, FLA_FLAT) for ours, theirs in table.items()}
    turned = {theirs: ours for ours, theirs in FLA_TRANSPOSED.items()}
    made: Tensors = {}
    for name, x in tensors.items():
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        prefix = f"blocks.{layer}."
        if name in outside:
            made[outside[name]] = x
        elif part == "attn.x_x":  # repositories of early 2025 have the six mixes in one
            for i, mix in enumerate("rwkvag"):
                made[f"{prefix}att.x_{mix}"] = x.map(partial(nth, i, 6))
        elif part in turned:
            made[prefix + turned[part]] = x.map(transposed)
        else:
            made[prefix + inside[part] if part in inside else name] = x
    return made


def describe(told: Mapping[str, Any]) -> dict[str, Any]:
    """What their config.json says, in the words of our configurations; `heronry.load` holds it against the tensors.

    Raises:
        InputError: it asks for what these models do not have.
    """
    kind = told.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(f"config.json is that of model_type {kind!r}; known are {', '.join(ARCHITECTURES)}")
    fla = kind == "rwkv7"
    epsilon = told.get("norm_eps" if fla else "layer_norm_epsilon", 1e-5)
    if epsilon != 1e-5:
        raise InputError(f"config.json wants layer norms with epsilon {epsilon}; all RWKV models have 1e-5")
    if fla and (told.get("hidden_act", "sqrelu") != "sqrelu" or not told.get("norm_first", True)):
        raise InputError("config.json wants another activation than sqrelu or no norm before the first layer")
    if fla and told.get("attn"):
        raise InputError("config.json wants attention in some layers, which is no RWKV-7")
    sizes = {
        "vocab_size": told.get("vocab_size"),
        "n_layer": told.get("num_hidden_layers"),
        "n_embd": told.get("hidden_size"),
        "dim_att": told.get("attention_hidden_size"),
        "dim_ffn": told.get("intermediate_size"),
        "head_size": told.get("head_dim" if fla else "head_size"),
    }
    if fla:
        sizes |= {f"{ours}_rank": told.get(f"{theirs}_low_rank_dim") for ours, theirs in RANKS.items()}
        size = sizes["head_size"]
        # fla's group norm divides by the head's size before a norm of norm_eps
        sizes["ln_x_eps"] = told.get("ln_x_eps", _times(size) if isinstance(size, int) else None)
        if sizes["n_layer"] == 1:
            sizes.pop("value_rank")  # the only layer has none, whatever is written
    elif kind != "rwkv":
        sizes |= {ours: told.get(theirs) for ours, theirs in MORE[kind].items()}
        divisor = told.get("head_size_divisor", 8)
        sizes["ln_x_eps"] = _times(divisor * divisor) if isinstance(divisor, int | float) else None
    if kind in ("rwkv", "rwkv7"):
        sizes.pop("head_size" if kind == "rwkv" else "dim_att")
    if told.get("time_state"):
        sizes["time_state"] = True
    described = {"model": next(ours for ours, theirs in MODEL_TYPES.items() if theirs == kind)}
    described |= {key: value for key, value in sizes.items() if value is not None}
    return described | dict(told.get("heronry") or {})


# what RWKV-5 and 6 of the hub are in one way only, so that their config.json needs not say it
MORE = {
    "rwkv5": {"version": "version", "log_bonus": "log_bonus"},
    "rwkv6": {"mix_rank": "time_mix_extra_dim", "decay_rank": "time_decay_extra_dim"},
}
RANKS = {"decay": "decay", "iclr": "a", "value": "v", "gate": "gate"}


def _times(factor: float) -> float:
    """`factor` * 1e-5, and 64e-5 as we write it for the factor of all published models."""
    return 64e-5 if factor == 64 else factor * 1e-5


def config_json(name: str, config: Any, notes: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Their config.json for a model of ours. name: "rwkv4" ...; config: its configuration."""
    kind = MODEL_TYPES[name]
    told: dict[str, Any] = {
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
        told |= {
            "head_dim": config.head_size,
            "num_heads": config.dim_att // config.head_size,
            "value_dim": [config.dim_att] * config.n_layer,
            **{f"{theirs}_low_rank_dim": getattr(config, f"{ours}_rank") for ours, theirs in RANKS.items()},
            "hidden_act": "sqrelu",
            "norm_first": True,
            "norm_bias": True,
            "norm_eps": 1e-5,
            "fuse_norm": False,
            "max_position_embeddings": 2048,  # of training; nothing ends there
        }
        if config.ln_x_eps != _times(config.head_size):
            told["ln_x_eps"] = config.ln_x_eps
    else:
        told |= {
            "attention_hidden_size": config.dim_att,
            "layer_norm_epsilon": 1e-5,
            "rescale_every": 6,  # what these classes divide by, against overflow in float16; ours need not
            "context_length": 1024 if kind == "rwkv" else 4096,
        }
        if kind != "rwkv":
            divisor = 8 if config.ln_x_eps == 64e-5 else (config.ln_x_eps / 1e-5) ** 0.5
            told |= {"head_size": config.head_size, "head_size_divisor": divisor}
            told |= {"num_attention_heads": config.dim_att // config.head_size}
            told |= {theirs: getattr(config, ours) for ours, theirs in MORE[kind].items()}
    told |= {"time_state": True} if config.time_state else {}
    return told | ({"heronry": dict(notes)} if notes else {})
