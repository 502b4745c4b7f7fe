"""rwkv-rs' folders (rwkv-rs/transformers-rwkv): RWKV-7 under four tables of names, which are only read.

- a, August 2026: BlinkDL's names after "model."
- b, published as rwkv-rs/rwkv7-g1-st: the words of other models of transformers, `layers.i.linear_attn.r_proj`
- c and d, pull requests 4 and 5: BlinkDL's words, but "embeddings"; d has the low-rank matrices as nn.Linear
- model_type is that of RWKV-4 in transformers ("rwkv"), with architecture_version "rwkv7"
- the embedding may hold LN0(embedding) already: such a model has no ln0 (`RWKV7Config.ln0_folded`)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError, show
from .huggingface import tie_head
from .lazy_tensor import Tensors, transposed
from .prefixes import strip_prefixes

# words of a name, rwkv-rs' and BlinkDL's; all others are the same
WORDS = {
    "embed_tokens": "emb",
    "embeddings": "emb",
    "embedding_norm": "blocks.0.ln0",
    "layers": "blocks",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "linear_attn": "att",
    "mlp": "ffn",
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "g_norm": "ln_x",
    "norm": "ln_out",
    "lm_head": "head",
}
LINEAR = re.compile(r"(\.att\.[wavg][12])\.weight$")  # in d
LN0 = ("blocks.0.ln0.weight", "blocks.0.ln0.bias")
SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "intermediate_size": "dim_ffn",
    "head_size": "head_size",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "iclr_rank",
    "v_low_rank_dim": "value_rank",
    "gate_low_rank_dim": "gate_rank",
    "group_norm_epsilon": "ln_x_eps",
}


def is_rwkv_rs(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with these names, prefixes removed, and this config.json ({}: none) is one of rwkv-rs'."""
    names = set(names)
    return (
        config.get("architecture_version") == "rwkv7"
        or {"embed_tokens.weight", "layers.0.linear_attn.w0"} <= names
        or {"embeddings.weight", "blocks.0.att.x_r"} <= names
    )


def read(tensors: Tensors, hub_config: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors under BlinkDL's names, and the config in the terms of heronry's.

    hub_config: config.json; {} for a file without one.

    Raises:
        InputError: config.json says something that these models do not have.
    """
    has_embeddings = "embeddings.weight" in strip_prefixes(tensors)
    tensors = _to_blinkdl(tensors)
    config = _read_config(hub_config) if hub_config else {"model": "rwkv7"}
    folded = hub_config.get("embedding_layer_norm_fused", has_embeddings and LN0[0] not in tensors)
    if not isinstance(folded, bool):
        raise InputError(f"config.json says embedding_layer_norm_fused = {show(folded)}; expected true or false")
    if folded:
        tensors = {name: x for name, x in tensors.items() if name not in LN0}  # kept in a, but never used
    return tie_head(tensors, hub_config.get("tie_word_embeddings")), config | {"ln0_folded": folded}


def _to_blinkdl(tensors: Tensors) -> Tensors:
    renamed: Tensors = {}
    for name, x in strip_prefixes(tensors).items():
        name = ".".join(WORDS.get(word, word) for word in name.split("."))
        linear = LINEAR.search(name)
        renamed[LINEAR.sub(r"\1", name)] = x.map(transposed) if linear else x
    return renamed


def _read_config(hub_config: Mapping[str, Any]) -> dict[str, Any]:
    epsilon = hub_config.get("layer_norm_epsilon", 1e-5)
    if epsilon != 1e-5:
        raise InputError(f"config.json has layer norms with epsilon {show(epsilon)}; all RWKV models have 1e-5")
    config = {ours: hub_config[theirs] for theirs, ours in SIZES.items() if hub_config.get(theirs) is not None}
    if config.get("n_layer") == 1:
        config.pop("value_rank", None)  # the only layer has none, whatever config.json says
    heads, size = hub_config.get("num_attention_heads"), config.get("head_size", 64)
    if isinstance(heads, int) and isinstance(size, int):
        config["dim_att"] = heads * size
    return {"model": "rwkv7", **config}
