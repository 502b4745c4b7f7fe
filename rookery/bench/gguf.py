"""An RWKV-7 as the GGUF file that llama.cpp reads: architecture "rwkv7", matrices in float16 or float32.

llama.cpp wants every low-rank matrix in the layout of nn.Linear, the six mixes of the time mix as one tensor, and a
value residual in layer 0 too, which it never reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models import RWKV7

NAMES = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}
PARTS = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.output": "time_mix_output",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.key": "channel_mix_key",
    "ffn.value": "channel_mix_value",
}
MIXES = tuple(f"x_{name}" for name in "rwkvag")  # in the order in which llama.cpp cuts them apart
FLOAT32 = ("time_mix_lerp_fused.weight", "time_mix_w1.weight", "time_mix_w2.weight")  # whatever the rest is in


def write_gguf(model: RWKV7, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes `model` with a vocabulary of bytes and paddings: whoever measures feeds token ids.

    dtype: of the matrices, float16 or float32; vectors are float32.

    Raises:
        InputError: the model has what llama.cpp has no place for.
    """
    config = model.config
    usual = config.dim_att == config.n_embd and config.ln_x_eps == 64e-5 and not config.time_state
    if not usual or config.head_size != 64:  # other heads it reads and computes wrongly
        raise InputError(
            "llama.cpp knows RWKV-7 with heads of 64, as many attention channels as channels and no tuned state"
        )
    gguf: Any = import_module("gguf")
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(0)  # asked for and not used
    writer.add_wkv_head_size(config.head_size)
    writer.add_decay_lora_rank(config.decay_rank)
    writer.add_iclr_lora_rank(config.iclr_rank)
    writer.add_value_residual_mix_lora_rank(config.value_rank)
    writer.add_gate_lora_rank(config.gate_rank)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else gguf.LlamaFileType.ALL_F32)
    real = min(257, config.vocab_size)
    words = [b"<s>", *(b"\\x%02x" % byte for byte in range(256))][:real]
    words += [b"[PAD%d]" % token for token in range(real, config.vocab_size)]
    kinds = [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (real - 1)
    kinds += [gguf.TokenType.UNUSED] * (config.vocab_size - real)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    for name, x in _tensors(model):
        wide = x.ndim == 1 or name.endswith(FLOAT32)
        writer.add_tensor(name, x.to(torch.float32 if wide else dtype).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: RWKV7) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and layouts."""
    weights = {name: x.detach() for name, x in model.named_parameters()}
    for i in range(model.config.n_layer):
        mixes = [weights.pop(f"blocks.{i}.att.{mix}") for mix in MIXES]
        yield f"blk.{i}.time_mix_lerp_fused.weight", torch.stack(mixes)  # [6, 1, 1, C]
    for name, x in weights.items():
        if name in NAMES:
            yield NAMES[name], x
            continue
        _, layer, part = name.split(".", 2)
        if part.endswith(tuple(f"att.{rank}{i}" for rank in "wavg" for i in "12")):
            x = x.T
        elif not part.endswith(".weight"):
            x = x.flatten()
        part, kind = (part, "weight") if part.split(".")[-1] not in ("weight", "bias") else part.rsplit(".", 1)
        part = PARTS.get(part) or part.replace("att.", "time_mix_")
        yield f"blk.{layer}.{part}.{kind}", x
        if layer == "0" and part.startswith("time_mix_a"):
            yield f"blk.0.{part.replace('mix_a', 'mix_v')}.{kind}", x
