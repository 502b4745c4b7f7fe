"""GGUF, the files of llama.cpp: RWKV-6 and RWKV-7.

- vectors and small matrices are float32, the large ones whatever the file is in
- low-rank matrices lie as in nn.Linear, the mixes of the time mix as one tensor
- RWKV-7 has a value residual in layer 0 too, which nothing reads
- RWKV-6 may hold `att.output` and `ffn.value` divided by 2 every few layers, and says so
- besides the words a file of ours holds the tokenizer.json it came with, under the key that GGUF has for it
The package gguf, which llama.cpp's own tools use, reads and writes the container and knows the quantized types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .lazy_tensor import LazyTensor, Progress, Tensors, nth, squeezed, times, transposed

NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
# within a layer, "blocks.i." and "blk.i."; vectors of both generations get a ".weight" more
PARTS = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
    # RWKV-6
    "att.gate": "time_mix_gate",
    "ffn.receptance": "channel_mix_receptance",
    "att.time_maa_x": "time_mix_lerp_x",
    **{f"att.time_maa_w{i}": f"time_mix_w{i}" for i in (1, 2)},
    "att.time_faaaa": "time_mix_first",
    "att.time_decay": "time_mix_decay",
    **{f"att.time_decay_w{i}": f"time_mix_decay_w{i}" for i in (1, 2)},
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    # RWKV-7
    **{f"att.{name}{i}": f"time_mix_{name}{i}" for name in "wavg" for i in range(3)},
    "att.k_k": "time_mix_k_k",
    "att.k_a": "time_mix_k_a",
    "att.r_k": "time_mix_r_k",
    "ffn.x_k": "channel_mix_lerp_k",
}
MIXES = {  # in the order in which llama.cpp cuts them apart
    "rwkv6": [f"att.time_maa_{name}" for name in "wkvrg"],
    "rwkv7": [f"att.x_{name}" for name in "rwkvag"],
}
FUSED = "time_mix_lerp_fused.weight"
BARE = re.compile(r"att\.([wavg][012]|k_k|k_a|r_k|x_\w|time_\w+)|ffn\.(x_k|time_\w+)")  # without ".weight" with us
TRANSPOSED = re.compile(r"att\.([wavg][12]|time_(maa|decay)_w[12])")
# whatever the rest is in, llama.cpp wants these in float32
FLOAT32 = tuple(f"time_mix_{name}.weight" for name in ("first", "w1", "w2", "decay_w1", "decay_w2", "lerp_fused"))
SIZES = {  # what a file says of itself, in the words of our configurations
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "dim_ffn",
    "wkv.head_size": "head_size",
    "time_mix_extra_dim": "mix_rank",
    "time_decay_extra_dim": "decay_rank",
    "attention.decay_lora_rank": "decay_rank",
    "attention.iclr_lora_rank": "iclr_rank",
    "attention.value_residual_mix_lora_rank": "value_rank",
    "attention.gate_lora_rank": "gate_rank",
}
GENERATION = {  # where llama.cpp has one name for what both have
    **dict.fromkeys(("ffn.time_maa_k", "att.time_maa_w1", "att.time_maa_w2"), "rwkv6"),
    **dict.fromkeys(("ffn.x_k", "att.w1", "att.w2"), "rwkv7"),
}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # that are written
TOKENIZER = "tokenizer.huggingface.json"


def library() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise InputError("GGUF files take the package gguf: pip install 'heronry[convert]'") from error


def block_bytes(kind: str) -> int:
    """The size of a block of 32 weights."""
    gguf = library()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]


def dequantize(data: np.ndarray, kind: str) -> Tensor:
    """The bytes of a quantized tensor as float32."""
    gguf = library()
    quantization = gguf.GGMLQuantizationType[kind]
    if data.ndim == 1:
        data = data.reshape(-1, gguf.GGML_QUANT_SIZES[quantization][1])
    return torch.from_numpy(gguf.quants.dequantize(data, quantization))


def read(path: Path) -> tuple[Tensors, dict[str, Any], str | None]:
    """The tensors under BlinkDL's names, quantized ones in float32; what the file says of itself; the tokenizer.json
    that it carries."""
    gguf = library()
    try:
        file = gguf.GGUFReader(path, "c")
        fields = {key: field.contents() for key, field in file.fields.items() if not key.startswith("tokenizer.ggml")}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise InputError(f"damaged or truncated GGUF file ({str(error)[:120] or type(error).__name__})") from error
    kind = fields.get("general.architecture")
    if kind not in MIXES:
        raise InputError(f"a GGUF file of the architecture {kind!r}; known are {', '.join(MIXES)}")
    epsilon = fields.get(f"{kind}.attention.layer_norm_epsilon", 1e-5)
    if abs(epsilon - 1e-5) > 1e-9:
        raise InputError(f"it wants layer norms with epsilon {epsilon}; all RWKV models have 1e-5")
    described: dict[str, Any] = {"model": kind}
    for key, ours in SIZES.items():
        if f"{kind}.{key}" in fields:
            described[ours] = int(fields[f"{kind}.{key}"])
    tensors = {x.name: _stored(gguf, x) for x in file.tensors}
    rescaled = int(fields.get(f"{kind}.rescale_every_n_layers", 0))
    found = _to_blinkdl(tensors, kind, described.get("head_size", 64), rescaled)
    if described.get("n_layer") == 1:
        described.pop("value_rank", None)  # that of a tensor which nothing reads
    return found, described | json.loads(fields.get("heronry.notes", "{}")), fields.get(TOKENIZER)


def _stored(gguf: Any, tensor: Any) -> LazyTensor:
    shape = torch.Size(int(size) for size in tensor.shape[::-1])
    kind = tensor.tensor_type.name
    if kind in ("F32", "F16", "F64"):
        return LazyTensor.of(torch.from_numpy(tensor.data).view(shape))
    if kind == "BF16":
        return LazyTensor.of(torch.from_numpy(tensor.data).view(torch.bfloat16).view(shape))
    return LazyTensor(shape, torch.float32, lambda: _unpacked(gguf, tensor).view(shape))


def _unpacked(gguf: Any, tensor: Any) -> Tensor:
    try:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise InputError(f"{tensor.name} is quantized as {tensor.tensor_type.name}, which is not read") from error


def _to_blinkdl(tensors: Tensors, kind: str, head_size: int, rescaled: int) -> Tensors:
    outside = {theirs: ours for ours, theirs in NAMES.items()}
    other = "rwkv7" if kind == "rwkv6" else "rwkv6"
    inside = {theirs: ours for ours, theirs in PARTS.items() if GENERATION.get(ours) != other}
    for mix in MIXES["rwkv6"]:  # files of 2024 have them one by one
        inside[f"time_mix_lerp_{mix[-1]}"] = mix
    made: Tensors = {}
    for name, x in tensors.items():
        if name in outside:
            made[outside[name]] = x
            continue
        block, layer, part = name.split(".", 2) if name.count(".") > 1 else ("", "", name)
        stem, _, last = part.rpartition(".")
        prefix = f"blocks.{layer}."
        if block == "blk" and part == FUSED:
            count = len(MIXES[kind])
            for i, mix in enumerate(MIXES[kind]):
                made[prefix + mix] = x.map(partial(nth, i, count))
            continue
        if block != "blk" or stem not in inside:
            made[name] = x  # told of by its own name
            continue
        ours = inside[stem]
        if TRANSPOSED.fullmatch(ours):
            x = x.map(transposed)
        elif ours == "att.r_k":
            x = x.map(lambda x: x.reshape(-1, head_size))
        elif rescaled and ours in ("att.output", "ffn.value"):
            x = x.map(partial(times, 2.0 ** (int(layer) // rescaled)))
        made[prefix + ours + ("" if BARE.fullmatch(ours) else f".{last}")] = x
    return made


def write(
    tensors: Tensors,
    config: Any,
    path: Path,
    kind: str,
    words: Sequence[bytes] | None,
    tokenizer: str | None,
    notes: dict[str, Any],
    progress: Progress,
) -> None:
    """A GGUF file of an RWKV-6 or 7 under BlinkDL's names.

    kind: of the large matrices, a key of TYPES.
    words: the bytes that each id stands for; None where that cannot be said.
    tokenizer: a tokenizer.json as it is.
    notes: what LLM should know of the model.

    Raises:
        InputError: the model has what llama.cpp has no place for.
    """
    gguf = library()
    name = "rwkv7" if "blocks.0.att.r_k" in tensors else "rwkv6"
    check(tensors, config)
    if kind not in TYPES:
        raise InputError(f"GGUF files are written as {', '.join(TYPES)}, not {kind}")
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(0)  # asked for and not used
    writer.add_wkv_head_size(config.head_size)
    if name == "rwkv7":
        writer.add_decay_lora_rank(config.decay_rank)
        writer.add_iclr_lora_rank(config.iclr_rank)
        writer.add_value_residual_mix_lora_rank(config.value_rank)
        writer.add_gate_lora_rank(config.gate_rank)
    else:
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(config.mix_rank)
        writer.add_time_decay_extra_dim(config.decay_rank)
    files = gguf.LlamaFileType
    types = {"F32": files.ALL_F32, "F16": files.MOSTLY_F16, "BF16": files.MOSTLY_BF16, "Q8_0": files.MOSTLY_Q8_0}
    writer.add_file_type(types[TYPES[kind]])
    _write_words(gguf, writer, config.vocab_size, words, tokenizer)
    if notes:
        writer.add_string("heronry.notes", json.dumps(notes))
    planned = [(theirs, x, _type(theirs, x, kind)) for theirs, x in _from_blinkdl(tensors, name).items()]
    for theirs, x, type_ in planned:
        quantization = gguf.GGMLQuantizationType[type_]
        size, bytes_ = gguf.GGML_QUANT_SIZES[quantization]
        shape = [*x.shape[:-1], x.shape[-1] // size * bytes_]
        writer.add_tensor_info(theirs, shape, np.dtype(np.uint8), x.numel() // size * bytes_, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, x, type_ in planned:
        data = _bytes(gguf, x.read(), type_)
        writer.write_tensor_data(data)
        progress(data.nbytes)
    writer.close()


def check(tensors: Tensors, config: Any) -> None:
    """InputError unless llama.cpp computes what this model does."""
    if not ("blocks.0.att.r_k" in tensors or "blocks.0.att.time_maa_x" in tensors):
        raise InputError("GGUF files are for RWKV-6 and RWKV-7; llama.cpp knows no other RWKV")
    if config.head_size != 64 or config.dim_att != config.n_embd or config.ln_x_eps != 64e-5 or config.time_state:
        raise InputError(
            "llama.cpp knows RWKV with heads of 64, as many attention channels as channels and no tuned initial state"
        )


def _write_words(gguf: Any, writer: Any, size: int, words: Sequence[bytes] | None, tokenizer: str | None) -> None:
    pieces = None if tokenizer is None else _pieces(json.loads(tokenizer))
    if pieces is not None:
        names, merges, special = pieces
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
        told = {token: name.encode() for name, token in names.items()}
    else:
        special = {0}
        writer.add_tokenizer_model("rwkv")
        told = {token: repr(word)[2:-1].encode() for token, word in enumerate(words or ()) if word}
        if not told.get(0):
            told[0] = b"<s>"
    control = {token for token in special if token in told}
    writer.add_token_list([told.get(token, b"[PAD%d]" % token) for token in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if i in control else kinds.NORMAL if i in told else kinds.UNUSED for i in range(size)]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if tokenizer is not None:
        writer.add_string(TOKENIZER, tokenizer)


def _pieces(told: dict[str, Any]) -> tuple[dict[str, int], list[str], set[int]] | None:
    """Words, merges and special ids of a byte-level BPE, which llama.cpp can read too."""
    model, before = told.get("model") or {}, told.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    words = dict(model["vocab"]) | {token["content"]: token["id"] for token in told.get("added_tokens") or ()}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return words, merges, {token["id"] for token in told.get("added_tokens") or () if token.get("special")}


def _from_blinkdl(tensors: Tensors, name: str) -> Tensors:
    mixes = MIXES[name]
    made: Tensors = {}
    for key, x in tensors.items():
        if key in NAMES:
            made[NAMES[key]] = x
            continue
        _, layer, part = key.split(".", 2)
        prefix = f"blk.{layer}."
        if part in mixes:
            if part == mixes[0]:
                parts = [tensors[f"blocks.{layer}.{mix}"] for mix in mixes]
                made[prefix + FUSED] = LazyTensor.made(
                    lambda *of: torch.stack([m.reshape(1, 1, -1) for m in of]), *parts
                )
            continue
        stem, last = (part, "weight") if BARE.fullmatch(part) else part.rsplit(".", 1)
        if TRANSPOSED.fullmatch(part):
            x = x.map(transposed)
        elif part in ("att.r_k", "att.time_decay"):
            x = x.map(Tensor.flatten)
        elif len(x.shape) > 2:
            x = x.map(squeezed)
        made[f"{prefix}{PARTS[stem]}.{last}"] = x
        if layer == "0" and name == "rwkv7" and re.fullmatch(r"att\.a[012]", part):
            made[f"{prefix}{PARTS[stem].replace('mix_a', 'mix_v')}.{last}"] = x
    return made


def _type(name: str, x: LazyTensor, kind: str) -> str:
    if len(x.shape) == 1 or name.endswith(FLOAT32):
        return "F32"
    if kind == "q8_0" and x.shape[-1] % 32:
        return "F16"
    return TYPES[kind]


def _bytes(gguf: Any, x: Tensor, type_: str) -> np.ndarray:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(type_)
    if dtype is not None:
        return x.to(dtype).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(x.float().contiguous().numpy(), gguf.GGMLQuantizationType[type_])
