"""Folders in Hugging Face's layouts: config.json, and the weights as safetensors or .bin.

- RWKV-4 as in transformers' RwkvForCausalLM (RWKV/rwkv-4-*), RWKV-5 and 6 as in the repositories RWKV/rwkv-5-* and
  RWKV/rwkv-6-*: BlinkDL's names with longer words and a prefix
- RWKV-7 as in the official repositories of 2026 (RWKV/RWKV7-*-2026*, G1): BlinkDL's names with a prefix; or as in
  flash-linear-attention (RWKV/RWKV7-Goose-*, fla.py), with the same model_type. The names decide, not config.json
- additional names hold what these layouts have no place for: a tuned initial state, the epsilon of a group norm, and
  the notes for LLM ("heronry" in config.json)

Sources: the configuration and model classes of transformers (models/rwkv, and rwkv7 as in the repositories) and of
flash-linear-attention (models/rwkv7).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import InputError, show
from . import fla
from .lazy_tensor import LazyTensor, Tensors, as_row
from .prefixes import strip_prefixes

log = logging.getLogger("heronry")

# model_type -> the class in transformers or in the repository
ARCHITECTURES = {
    "rwkv": "RwkvForCausalLM",
    "rwkv5": "Rwkv5ForCausalLM",
    "rwkv6": "Rwkv6ForCausalLM",
    "rwkv7": "Rwkv7ForCausalLM",
}
FLA_ARCHITECTURE = "RWKV7ForCausalLM"
LAYOUTS = ("huggingface", "fla")
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

VECTORS = re.compile(r"\.(att\.(x_[rwkvag]|[wav]0|k_[ka])|ffn\.x_k)$")  # [1, 1, C] there, in any shape elsewhere
DEEP_RANK = 32  # of the published RWKV-7a
UNUSED_RANK = 32  # of a value residual that is never read, where the model has none to go by
PREFIX = "rwkv7."  # of transformers' RWKV-7, in front of all names but the head's


def from_blinkdl(tensors: Tensors, layout: str = "huggingface") -> Tensors:
    """The same tensors under Hugging Face's names. layout: of RWKV-7, one of LAYOUTS."""
    if "blocks.0.att.r_k" not in tensors:
        words = {name: ".".join(WORDS.get(word, word) for word in name.split(".")) for name in tensors}
        return {("" if name == "head.weight" else "rwkv.") + words[name]: x for name, x in tensors.items()}
    if unknown := next((name for name in tensors if not fla.has_place_for(name)), None):
        raise InputError(f"Hugging Face's layouts of RWKV-7 have no place for {unknown} (7a and 7b are not in them)")
    if layout == "fla":
        return fla.from_blinkdl(tensors)
    vectors = {name: x.map(as_row) for name, x in tensors.items() if VECTORS.search(name)}
    tensors = tensors | vectors | _unused(tensors)
    return {("" if name == "head.weight" else PREFIX) + name: x for name, x in tensors.items()}


def _unused(tensors: Tensors) -> Tensors:
    """What the official class of RWKV-7 has and never reads, as zeros: the value residual of layer 0."""
    w0, w1 = tensors["blocks.0.att.w0"], tensors["blocks.0.att.w1"]
    rank = tensors["blocks.1.att.v1"].shape[1] if "blocks.1.att.v1" in tensors else UNUSED_RANK
    shapes = {"v0": (1, 1, w0.numel()), "v1": (w1.shape[0], rank), "v2": (rank, w0.numel())}
    return {f"blocks.0.att.{name}": LazyTensor.zeros(shape, w0.dtype) for name, shape in shapes.items()}


def to_blinkdl(tensors: Tensors, tied: Any = False) -> Tensors:
    """The same tensors under BlinkDL's names; unknown names are kept, without their prefixes.

    tied: see `tie_head`.
    """
    tensors = strip_prefixes(tensors)
    if fla.is_fla(tensors):
        renamed = fla.to_blinkdl(tensors)
    else:
        words = {theirs: ours for ours, theirs in WORDS.items()}
        renamed = {".".join(words.get(word, word) for word in name.split(".")): x for name, x in tensors.items()}
    return tie_head(renamed, tied) | _missing_biases(renamed)


def tie_head(tensors: Tensors, tied: Any) -> Tensors:
    """The same tensors under BlinkDL's names, with the embedding as a head if they have none.

    tied: what config.json says of tie_word_embeddings. A head that is another than the embedding stays, with a warning,
        as in transformers.
    """
    emb = tensors.get("emb.weight")
    if not tied or emb is None:
        return tensors
    head = tensors.get("head.weight", emb)
    if head is not emb and not torch.equal(head.read(), emb.read()):
        log.warning("heronry: tie_word_embeddings is set, but the weights have a head of their own, which is used")
    return tensors | {"head.weight": head}


def _norm_biases(tensors: Tensors) -> dict[str, str]:
    """The names of the biases that the layer norms of an RWKV-7 have, and those of their weights."""
    norms = [name for name in tensors if re.fullmatch(r"(blocks\.\d+\.ln[012]|ln_out)\.weight", name)]
    return {f"{name.removesuffix('weight')}bias": name for name in norms if "blocks.0.att.r_k" in tensors}


def _missing_biases(tensors: Tensors) -> Tensors:
    """Zeros for the biases of an RWKV-7 whose layer norms have none (`norm_bias: false`)."""
    biases = _norm_biases(tensors)
    if any(bias in tensors for bias in biases):
        return {}
    return {bias: LazyTensor.zeros(tensors[name].shape, tensors[name].dtype) for bias, name in biases.items()}


def check_norm_bias(names: Iterable[str], hub_config: Mapping[str, Any]) -> None:
    """InputError where a config.json says otherwise than the tensors whether the layer norms of an RWKV-7 have biases.

    names: of the tensors, prefixes removed.
    """
    says, has = hub_config.get("norm_bias", True), not {"ln_out.bias", "norm.bias"}.isdisjoint(names)
    if hub_config.get("model_type") == "rwkv7" and says is not has:
        raise InputError(
            f"config.json says norm_bias = {show(says)}, but the layer norms have {'' if has else 'no '}biases"
        )


def default_epsilon(tensors: Tensors) -> dict[str, float]:
    """As a part of a config, the epsilon of the group norm of the classes of RWKV-7 where no config.json says another:
    1e-5 times the head size.

    tensors: under BlinkDL's names; {} for other generations.
    """
    r_k = tensors.get("blocks.0.att.r_k")
    return {} if r_k is None or len(r_k.shape) != 2 else {"ln_x_eps": _epsilon(r_k.shape[1])}


def read_config(hub_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of Hugging Face's in the terms of our configurations; `heronry.load` compares it with the tensors.

    Raises:
        InputError: it specifies something that these models do not have.
    """
    kind = hub_config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise InputError(f"config.json has the model_type {show(kind)}; supported are {', '.join(ARCHITECTURES)}")
    is_v7 = kind == "rwkv7"
    epsilon = hub_config.get("norm_eps" if is_v7 else "layer_norm_epsilon", 1e-5)
    if epsilon != 1e-5:
        raise InputError(f"config.json has layer norms with epsilon {show(epsilon)}; all RWKV models have 1e-5")
    for key, (value, what) in UNSUPPORTED.items():
        if is_v7 and hub_config.get(key, value) != value:
            raise InputError(f"config.json has {key} = {show(hub_config[key])}: {what}")
    if is_v7 and hub_config.get("attn"):
        raise InputError("config.json has attention in some layers, which RWKV-7 does not have")
    sizes = {
        "vocab_size": hub_config.get("vocab_size"),
        "n_layer": hub_config.get("num_hidden_layers"),
        "n_embd": hub_config.get("hidden_size"),
        "head_size": hub_config.get("head_dim" if is_v7 else "head_size"),
        "dim_att": hub_config.get("attention_hidden_size"),
        "dim_ffn": hub_config.get("intermediate_size"),
    }
    heads, size = hub_config.get("num_heads"), sizes["head_size"]
    if is_v7 and isinstance(heads, int) and isinstance(size, int):
        sizes["dim_att"] = heads * size
    if is_v7:
        sizes |= {f"{ours}_rank": hub_config.get(f"{name}_low_rank_dim") for ours, name in RANKS.items()}
        # the group norm has epsilon head_dim * norm_eps
        sizes["ln_x_eps"] = hub_config.get("ln_x_eps", _epsilon(size) if isinstance(size, int) else None)
        deep = hub_config.get("use_deep_embed")
        sizes["deep_rank"] = None if deep is None else DEEP_RANK if deep else 0
        sizes["ln0_folded"] = not hub_config.get("norm_first", True)
        if sizes["n_layer"] == 1:
            sizes.pop("value_rank")  # the only layer has none, whatever config.json says
    elif kind != "rwkv":
        sizes |= {ours: hub_config.get(name) for ours, name in VARIANT_KEYS[kind].items()}
        divisor = hub_config.get("head_size_divisor", 8)
        if not isinstance(divisor, int | float) or isinstance(divisor, bool) or not 0 < divisor < math.inf:
            raise InputError(f"config.json says head_size_divisor = {show(divisor)}; expected a positive number like 8")
        sizes["ln_x_eps"] = _epsilon(divisor * divisor)
    if kind == "rwkv":
        sizes.pop("head_size")
    if hub_config.get("time_state"):
        sizes["time_state"] = True
    config = {"model": next(name for name, model_type in MODEL_TYPES.items() if model_type == kind)}
    config |= {key: value for key, value in sizes.items() if value is not None}
    notes = hub_config.get("heronry") or {}
    if not isinstance(notes, dict):
        raise InputError(f"config.json says heronry = {show(notes)}; expected an object")
    return config | notes


# of RWKV-7: the one value that is supported, and what any other means
UNSUPPORTED = {
    "hidden_act": ("sqrelu", "RWKV-7 has no other activation than sqrelu"),
    "sparse_channel_mix": (False, "a sparse channel mix is not supported"),
}
# additional keys: the hub's RWKV-5 and 6 are of one variant each, so their config.json does not name it
VARIANT_KEYS = {
    "rwkv5": {"version": "version", "log_bonus": "log_bonus"},
    "rwkv6": {"mix_rank": "time_mix_extra_dim", "decay_rank": "time_decay_extra_dim"},
}
RANKS = {"decay": "decay", "iclr": "a", "value": "v", "gate": "gate"}


def _epsilon(factor: float) -> float:
    """`factor` * 1e-5; exactly the literal 64e-5 for the factor of all published models."""
    return 64e-5 if factor == 64 else factor * 1e-5


def layout_of(hub_config: Mapping[str, Any]) -> str:
    """Which of LAYOUTS a config.json was written for: only flash-linear-attention's says where its norms are."""
    return "fla" if "norm_first" in hub_config or "fuse_norm" in hub_config else "huggingface"


def config_json(
    name: str, config: Any, notes: Mapping[str, Any], dtype: torch.dtype, layout: str = "huggingface"
) -> dict[str, Any]:
    """The config.json of Hugging Face's for a model.

    Args:
        name: "rwkv4" ...
        config: its configuration.
        notes: see `heronry.save`.
        dtype: of the weights.
        layout: of RWKV-7, one of LAYOUTS; a model whose embedding holds ln0 is always "fla", which can say so.
    """
    kind = MODEL_TYPES[name]
    if getattr(config, "ln0_folded", False):
        layout = "fla"
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
            **{f"{name}_low_rank_dim": getattr(config, f"{ours}_rank") for ours, name in RANKS.items()},
            "norm_bias": True,
            "norm_eps": 1e-5,
            "max_position_embeddings": 8192,  # of training; not a limit
        }
        if layout == "fla":
            hub_config |= {
                "architectures": [FLA_ARCHITECTURE],
                "value_dim": [config.dim_att] * config.n_layer,
                "hidden_act": "sqrelu",
                "norm_first": not config.ln0_folded,  # whether the first layer has ln0
                "fuse_norm": False,
            }
        else:
            hub_config["v_low_rank_dim"] = config.value_rank or UNUSED_RANK
            hub_config |= {"pad_token_id": 0, "wkv_state_dtype": "float32", "wkv_implementation": "eager"}
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
