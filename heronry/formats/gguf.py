"""GGUF, the files of llama.cpp: RWKV-6 and RWKV-7.

- vectors and small matrices are float32, large ones have the type of the file
- low-rank matrices are stored as in nn.Linear, the token-shift mixes of the time mix as one tensor
- RWKV-7 has a value residual in layer 0 too, which nothing reads
- RWKV-6 may store `att.output` and `ffn.value` divided by 2 every few layers; the metadata say so
- besides the vocabulary, files written here hold their tokenizer.json under the key that GGUF has for it

llama.cpp's own package gguf reads and writes the container and the quantized types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, show
from ..progress import ByteCounter
from .ggml_types import dequantize, import_gguf, quantize
from .lazy_tensor import LazyTensor, Tensors, nth, squeezed, transposed
from .relatives import HYBRIDS

NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
# within a layer, "blocks.i." and "blk.i."; vectors of both generations get an additional ".weight"
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
MIXES = {  # in llama.cpp's order
    "rwkv6": [f"att.time_maa_{name}" for name in "wkvrg"],
    "rwkv7": [f"att.x_{name}" for name in "rwkvag"],
}
FUSED = "time_mix_lerp_fused.weight"
BARE = re.compile(
    r"att\.([wavg][012]|k_k|k_a|r_k|x_\w|time_\w+)|ffn\.(x_k|time_\w+)"
)  # no ".weight" in BlinkDL's names
TRANSPOSED = re.compile(r"att\.([wavg][12]|time_(maa|decay)_w[12])")
# llama.cpp expects these in float32, whatever the type of the file
FLOAT32 = tuple(f"time_mix_{name}.weight" for name in ("first", "w1", "w2", "decay_w1", "decay_w2", "lerp_fused"))
SIZES = {  # keys of the metadata and of our configurations
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
GENERATION = {  # where llama.cpp has one name for tensors of both generations
    **dict.fromkeys(("ffn.time_maa_k", "att.time_maa_w1", "att.time_maa_w2"), "rwkv6"),
    **dict.fromkeys(("ffn.x_k", "att.w1", "att.w2"), "rwkv7"),
}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # that can be written
TOKENIZER = "tokenizer.huggingface.json"
TEMPLATE = "tokenizer.chat_template"


def is_gguf(head: bytes) -> bool:
    """Whether a file begins like a GGUF file."""
    return head.startswith(b"GGUF")


def read(path: Path) -> tuple[Tensors, dict[str, Any], str | None, str | None]:
    """The tensors under BlinkDL's names, quantized ones in float32; the settings and notes in the metadata; the text
    of the tokenizer.json and the chat template stored in the file, if any."""
    gguf = import_gguf()
    try:
        file = gguf.GGUFReader(path, "c")
        fields = {key: field.contents() for key, field in file.fields.items() if not key.startswith("tokenizer.ggml")}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise InputError(f"damaged or truncated GGUF file ({str(error)[:120] or type(error).__name__})") from error
    kind = fields.get("general.architecture")
    if isinstance(kind, str) and kind in HYBRIDS:
        raise InputError(f"the file holds {HYBRIDS[kind]}, which is not supported")
    if not isinstance(kind, str) or kind not in MIXES:
        raise InputError(f"a GGUF file of the architecture {show(kind)}; supported are {', '.join(MIXES)}")

    def number(key: str, kinds: type | UnionType, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{key}", default)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise InputError(f"its metadata say {kind}.{key} = {show(value)}; expected a number")
        return value

    epsilon = number("attention.layer_norm_epsilon", int | float, 1e-5)
    if not abs(epsilon - 1e-5) <= 1e-9:
        raise InputError(f"its layer norms have epsilon {epsilon}; all RWKV models have 1e-5")
    config: dict[str, Any] = {"model": kind}
    for key, ours in SIZES.items():
        if (size := number(key, int)) is not None:
            config[ours] = size
    rescale_every = number("rescale_every_n_layers", int, 0) if kind == "rwkv6" else 0  # llama.cpp ignores it for 7
    if rescale_every < 0:
        raise InputError(f"its metadata say {kind}.rescale_every_n_layers = {rescale_every}; expected 0 or more")
    if isinstance(parts := fields.get("split.count"), int) and parts > 1:
        raise InputError(f"one of {parts} parts of a GGUF file; join them first: llama-gguf-split --merge")
    notes, tokenizer, template = fields.get("heronry.notes", "{}"), fields.get(TOKENIZER), fields.get(TEMPLATE)
    try:
        config |= {**json.loads(notes)}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"its metadata say heronry.notes = {show(notes)}; expected a JSON object") from error
    for key, text in ((TOKENIZER, tokenizer), (TEMPLATE, template)):
        if not isinstance(text, str | None):
            raise InputError(f"its metadata say {key} = {show(text)}; expected a text")
    tensors = {x.name: _as_lazy(x) for x in file.tensors}
    tensors = _to_blinkdl(tensors, kind, config.get("head_size", 64), rescale_every)
    if config.get("n_layer") == 1:
        config.pop("value_rank", None)  # the rank of a tensor that nothing reads
    return tensors, config, tokenizer, template


def _as_lazy(tensor: Any) -> LazyTensor:
    """A tensor of gguf.GGUFReader; quantized ones become float32 when read."""
    shape = torch.Size(int(size) for size in tensor.shape[::-1])
    kind = tensor.tensor_type.name
    if kind in ("F32", "F16", "F64"):
        return LazyTensor.from_tensor(torch.from_numpy(tensor.data).view(shape), mapped=True)
    if kind == "BF16":
        return LazyTensor.from_tensor(torch.from_numpy(tensor.data).view(torch.bfloat16).view(shape), mapped=True)

    def read_quantized() -> Tensor:
        try:
            return dequantize(tensor.data, kind).view(shape)
        except NotImplementedError as error:
            raise InputError(f"{tensor.name} is quantized as {kind}, which is not supported") from error

    return LazyTensor(shape, torch.float32, read_quantized, kind.lower())


def _to_blinkdl(tensors: Tensors, kind: str, head_size: int, rescale_every: int) -> Tensors:
    """llama.cpp's names -> BlinkDL's. kind: "rwkv6" or "rwkv7". Unknown names are kept, for the error message."""
    outside = {theirs: ours for ours, theirs in NAMES.items()}
    other = "rwkv7" if kind == "rwkv6" else "rwkv6"
    inside = {theirs: ours for ours, theirs in PARTS.items() if GENERATION.get(ours) != other}
    for mix in MIXES["rwkv6"]:  # files of 2024 have them as separate tensors
        inside[f"time_mix_lerp_{mix[-1]}"] = mix
    renamed: Tensors = {}
    for name, x in tensors.items():
        if name in outside:
            renamed[outside[name]] = x
            continue
        block, layer, part = name.split(".", 2) if name.count(".") > 1 else ("", "", name)
        stem, _, last = part.rpartition(".")
        prefix = f"blocks.{layer}."
        if block == "blk" and part == FUSED:
            count = len(MIXES[kind])
            for i, mix in enumerate(MIXES[kind]):
                renamed[prefix + mix] = x.map(partial(nth, i, count))
            continue
        if block != "blk" or stem not in inside or not layer.isdecimal():
            renamed[name] = x
            continue
        ours = inside[stem]
        if TRANSPOSED.fullmatch(ours):
            x = x.map(transposed)
        elif ours == "att.r_k":
            x = x.map(lambda x: x.reshape(-1, head_size))
        elif rescale_every and ours in ("att.output", "ffn.value"):
            power = int(layer) // rescale_every
            x = LazyTensor.deferred(x.shape, x.dtype, partial(_doubled, power), x)
        renamed[prefix + ours + ("" if BARE.fullmatch(ours) else f".{last}")] = x
    return renamed


def _doubled(times: int, x: Tensor) -> Tensor:
    return torch.ldexp(x, torch.tensor(times))


def write(
    tensors: Tensors,
    config: Any,
    path: Path,
    kind: str,
    vocabulary: Sequence[bytes] | None,
    tokenizer: str | None,
    end_of_text: int,
    template: str | None,
    empty_line_ends: bool,
    notes: dict[str, Any],
    counter: ByteCounter,
) -> None:
    """Writes a GGUF file of an RWKV-6 or 7 that `check_supported` accepts.

    Args:
        tensors: under BlinkDL's names.
        config: the model's configuration.
        kind: the type of the large matrices, a key of TYPES.
        vocabulary: the bytes of each token id; None if unknown.
        tokenizer: the text of a tokenizer.json.
        end_of_text: the id of the token that ends a text.
        template: the chat template in Jinja; None = "rwkv-world", which llama.cpp has.
        empty_line_ends: whether an empty line ends an answer.
        notes: see `heronry.save`.
    """
    gguf = import_gguf()
    name = "rwkv7" if "blocks.0.att.r_k" in tensors else "rwkv6"
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(0)  # required and not used
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
    _write_tokenizer(gguf, writer, config.vocab_size, vocabulary, tokenizer, end_of_text, template, empty_line_ends)
    if notes:
        writer.add_string("heronry.notes", json.dumps(notes))
    outputs = [(theirs, x, _choose_type(theirs, x, kind)) for theirs, x in _from_blinkdl(tensors, name).items()]
    for theirs, x, type_name in outputs:
        quantization = gguf.GGMLQuantizationType[type_name]
        size, n_bytes = gguf.GGML_QUANT_SIZES[quantization]
        shape = [*x.shape[:-1], x.shape[-1] // size * n_bytes]
        writer.add_tensor_info(theirs, shape, np.dtype(np.uint8), x.numel() // size * n_bytes, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:  # by ourselves, for numpy's writing does not say what is wrong with a disk
        for _, x, type_name in outputs:
            data = quantize(x.read(), type_name)
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(data.data)
            counter.add(data.nbytes)
        file.write(bytes(-file.tell() % writer.data_alignment))


def check_supported(tensors: Tensors, config: Any, kind: str) -> None:
    """InputError unless llama.cpp supports this model, and the type `kind` of the matrices is one of TYPES.

    tensors: under BlinkDL's names; config: its configuration.
    """
    if not ("blocks.0.att.r_k" in tensors or "blocks.0.att.time_maa_x" in tensors):
        raise InputError("GGUF files are for RWKV-6 and RWKV-7; llama.cpp supports no other RWKV")
    if config.head_size != 64 or config.dim_att != config.n_embd or config.ln_x_eps != 64e-5 or config.time_state:
        raise InputError(
            "llama.cpp supports only heads of 64, dim_att = n_embd, ln_x_eps = 64e-5 and no tuned initial state"
        )
    if kind not in TYPES:
        raise InputError(f"GGUF files are written as {', '.join(TYPES)}, not {kind}; give one of them (--dtype)")


def _write_tokenizer(
    gguf: Any,
    writer: Any,
    vocab_size: int,
    vocabulary: Sequence[bytes] | None,
    tokenizer: str | None,
    end_of_text: int,
    template: str | None,
    empty_line_ends: bool,
) -> None:
    """The vocabulary as llama.cpp reads it, a byte-level BPE or bytes by id, the tokenizer.json as it is, and the chat
    template."""
    bpe = None if tokenizer is None else _read_bpe(json.loads(tokenizer))
    if bpe is not None:
        names, merges, special = bpe
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
        pieces = {token: name.encode() for name, token in names.items()}
        empty_line = "ĊĊ".encode()
    else:
        special = {0}
        writer.add_tokenizer_model("rwkv")
        pieces = {token: repr(piece)[2:-1].encode() for token, piece in enumerate(vocabulary or ()) if piece}
        if not pieces.get(0):
            pieces[0] = b"<s>"
        empty_line = rb"\n\n"
    control = {token for token in special if token in pieces}
    writer.add_token_list([pieces.get(token, b"[PAD%d]" % token) for token in range(vocab_size)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if i in control else kinds.NORMAL if i in pieces else kinds.UNUSED for i in range(vocab_size)]
    )
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    end_of_turn = next((token for token, piece in pieces.items() if piece == empty_line), None)
    if end_of_turn is not None and empty_line_ends:
        writer.add_eot_token_id(end_of_turn)
        # as llama.cpp's own converter does: its template of this name needs a token that ends an answer
        template = template or "rwkv-world"
    if template is not None:
        writer.add_chat_template(template)
    if tokenizer is not None:
        writer.add_string(TOKENIZER, tokenizer)


def _read_bpe(tokenizer: dict[str, Any]) -> tuple[dict[str, int], list[str], set[int]] | None:
    """Tokens with their ids, merges and special ids of a tokenizer.json; None unless it is a byte-level BPE, which
    llama.cpp can use."""
    model, pre_tokenizer = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    added = tokenizer.get("added_tokens") or ()
    ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return ids, merges, {token["id"] for token in added if token.get("special")}


def _from_blinkdl(tensors: Tensors, name: str) -> Tensors:
    """BlinkDL's names -> llama.cpp's. name: "rwkv6" or "rwkv7"."""
    mixes = MIXES[name]
    renamed: Tensors = {}
    for key, x in tensors.items():
        if key in NAMES:
            renamed[NAMES[key]] = x
            continue
        _, layer, part = key.split(".", 2)
        prefix = f"blk.{layer}."
        if part in mixes:
            if part == mixes[0]:
                parts = [tensors[f"blocks.{layer}.{mix}"] for mix in mixes]
                renamed[prefix + FUSED] = LazyTensor.deferred(
                    (len(parts), 1, 1, x.numel()),
                    x.dtype,
                    lambda *vectors: torch.stack([x.reshape(1, 1, -1) for x in vectors]),
                    *parts,
                )
            continue
        stem, last = (part, "weight") if BARE.fullmatch(part) else part.rsplit(".", 1)
        if TRANSPOSED.fullmatch(part):
            x = x.map(transposed)
        elif part in ("att.r_k", "att.time_decay"):
            x = x.map(Tensor.flatten)
        elif len(x.shape) > 2:
            x = x.map(squeezed)
        renamed[f"{prefix}{PARTS[stem]}.{last}"] = x
        if layer == "0" and name == "rwkv7" and re.fullmatch(r"att\.a[012]", part):
            renamed[f"{prefix}{PARTS[stem].replace('mix_a', 'mix_v')}.{last}"] = x
    return renamed


def _choose_type(name: str, x: LazyTensor, kind: str) -> str:
    """The ggml type of a tensor with this name in llama.cpp, in a file of `kind`."""
    if len(x.shape) == 1 or name.endswith(FLOAT32):
        return "F32"
    if kind == "q8_0" and x.shape[-1] % 32:
        return "F16"
    return TYPES[kind]
