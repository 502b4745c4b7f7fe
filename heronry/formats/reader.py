"""Reads a checkpoint of any format. The format is recognised by the first bytes and the tensors, not by the name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from . import (
    fla,
    fla_rwkv6,
    folder,
    ggml,
    gguf,
    huggingface,
    packed_int8,
    pth,
    relatives,
    rwkv_lightning,
    rwkv_quant,
    rwkv_rs,
    safetensors_file,
    scaled_pth,
    vision_rwkv,
    webrwkv,
)
from .lazy_tensor import Tensors
from .prefixes import strip_prefixes

HEAD = 512  # bytes that show what a file is

# What a file is and who writes it, by its format; the layouts of the format "huggingface" by name.
DESCRIPTIONS = {
    "blinkdl": "a .pth under BlinkDL's names, as RWKV-LM and most trainers write it",
    "safetensors": "safetensors under BlinkDL's names",
    "heronry": "a folder of heronry's, as save and convert write it",
    "gguf": "a GGUF of llama.cpp's",
    "ggml": "a .bin of rwkv.cpp's",
    "webrwkv": "an .st of web-rwkv's, as Ai00 reads it",
    "vision_rwkv": "a checkpoint of Vision-RWKV's authors",
    "vrwkv_adapter": "a checkpoint of mmsegmentation or mmdetection with a Vision-RWKV inside, which alone is read",
    "rwkv_rs": "rwkv-rs' layout of RWKV-7 (transformers-rwkv)",
    "rwkv_lightning": "a quantized .rwkvq of rwkv_lightning's",
    "rwkv_quant": "a quantized .rwkvq of rwkv-quant's",
    "scaled_pth": "a .pth under BlinkDL's names with quantized matrices and their scales (vllm-rwkv, Albatross)",
    "official": "RWKV-7 in the layout of its official repositories (RWKV/RWKV7-*-2026*, G1)",
    "fla": "RWKV-7 in flash-linear-attention's layout (RWKV/RWKV7-Goose-*)",
    "fla_rwkv6": "RWKV-6 in flash-linear-attention's layout",
    "transformers": "RWKV-4 to 6 in the layout of transformers (RWKV/rwkv-4-*, rwkv-5-*, rwkv-6-*)",
}


@dataclass
class Checkpoint:
    """The contents of a file or folder.

    Attributes:
        format: a key of DESCRIPTIONS, or "huggingface".
        tensors: under BlinkDL's names.
        config: the settings stored with the tensors, as heronry's config.json has them, notes for LLM included; empty
            for a format that stores none.
        tokenizer: the text of a tokenizer.json stored inside the file.
        template: the chat template stored inside the file, in Jinja or as a name of llama.cpp's.
        layout: a key of DESCRIPTIONS; "" = that of the format.
    """

    format: str
    tensors: Tensors
    config: Mapping[str, Any]
    tokenizer: str | None = None
    template: str | None = None
    layout: str = ""

    @property
    def description(self) -> str:
        """What the file is and who writes it."""
        return DESCRIPTIONS.get(self.layout or self.format, self.format)


def read(path: Path) -> Checkpoint:
    """The contents of a checkpoint; its tensors are mapped, or read on demand.

    Raises:
        InputError: what is wrong with it, in one line.
    """
    if os.path.isdir(path):
        return _read_folder(path)
    if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
        raise InputError("no such file or folder")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error
    if not head:
        raise InputError("the file is empty")
    if gguf.is_gguf(head):
        return Checkpoint("gguf", *gguf.read(path))
    if ggml.is_ggml(head):
        return Checkpoint("ggml", ggml.read(path), {})
    if rwkv_lightning.is_rwkvq(head):
        return _quantized("rwkv_lightning", rwkv_lightning.read(path))
    if safetensors_file.is_safetensors(head):  # before .pth: the length in front may have any bytes
        return _read_safetensors(path)
    if pth.is_pth(head):
        return _recognise_names("blinkdl", pth.read(path))
    relatives.check_head(head)
    if path.suffix in (".safetensors", ".st"):
        return _recognise_names("safetensors", safetensors_file.read(path))
    if path.suffix == ".onnx":
        raise InputError("an ONNX graph, which is written, not read; give the model that it was made from")
    raise InputError("not a .pth, .safetensors, GGUF or rwkv.cpp file")


def _read_safetensors(path: Path) -> Checkpoint:
    metadata = safetensors_file.read_metadata(path)
    if rwkv_quant.KEY in metadata:
        return Checkpoint("rwkv_quant", *rwkv_quant.read(path, metadata))
    return _recognise_names("safetensors", safetensors_file.read(path), metadata)


def _recognise_names(format: str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """The checkpoint of a file that holds nothing but tensors: their names show the format, the more special ones
    first.

    metadata: of a safetensors file.
    """
    relatives.check_names(tensors)
    is_official = f"{huggingface.PREFIX}emb.weight" in tensors
    tensors = strip_prefixes(tensors)
    if scaled_pth.is_scaled(tensors):
        return _quantized("scaled_pth", scaled_pth.read(tensors))
    if rwkv_rs.is_rwkv_rs(tensors, {}):
        return Checkpoint("rwkv_rs", *rwkv_rs.read(tensors, {}))
    if fla_rwkv6.is_fla_rwkv6(tensors):
        return Checkpoint("huggingface", fla_rwkv6.to_blinkdl(tensors), fla_rwkv6.ALONE, layout="fla_rwkv6")
    if is_official or "embeddings.weight" in tensors:
        layout, tensors = _transformers_layout(tensors), huggingface.to_blinkdl(tensors)
        epsilon = huggingface.default_epsilon(tensors)
        return Checkpoint("huggingface", tensors, {"model": "rwkv7", **epsilon} if epsilon else {}, layout=layout)
    if metadata is not None and webrwkv.is_webrwkv(tensors, metadata):
        return Checkpoint("webrwkv", webrwkv.to_blinkdl(tensors), {})
    if vision_rwkv.is_vision_rwkv(tensors):
        layout = "vrwkv_adapter" if vision_rwkv.is_dense(tensors) else ""
        return Checkpoint("vision_rwkv", vision_rwkv.to_heronry(tensors), {}, layout=layout)
    return Checkpoint(format, tensors, {})


def _quantized(format: str, tensors: Tensors) -> Checkpoint:
    """The checkpoint of an RWKV-7 whose matrices may be packed as heronry's int8 (packed_int8.py)."""
    packed = {"model": "rwkv7", "quantization": "int8"} if packed_int8.holds_packed(tensors) else {}
    if "blocks.0.att.r_k" not in tensors:
        raise InputError("quantized matrices of another program, which are read of RWKV-7 only")
    return Checkpoint(format, tensors, packed)


def _transformers_layout(tensors: Tensors) -> str:
    """The layout of tensors under names of transformers' kind, prefixes removed."""
    if fla.is_fla(tensors):
        return "fla"
    return "official" if "blocks.0.att.r_k" in tensors else "transformers"


def _read_folder(path: Path) -> Checkpoint:
    if any((path / name).is_file() for name in ("adapter_config.json", "adapter.json")):
        raise InputError("the folder holds an adapter; give its model, and this folder with --adapter")
    if not (path / "config.json").is_file():
        raise InputError(f"no config.json in the folder{folder.hint(path)}")
    config = read_json(path / "config.json")
    if "model" in config and "model_type" not in config:
        return Checkpoint("heronry", strip_prefixes(folder.read(path)), config)
    relatives.check_config(config, huggingface.ARCHITECTURES)
    tensors = folder.read(path)
    relatives.check_names(tensors)
    names = strip_prefixes(tensors)
    if rwkv_rs.is_rwkv_rs(names, config):
        return Checkpoint("rwkv_rs", *rwkv_rs.read(tensors, config))
    if "model_type" not in config:
        return Checkpoint("heronry", names, config)
    tied = config.get("tie_word_embeddings")
    if fla_rwkv6.is_fla_rwkv6(names):
        return Checkpoint(
            "huggingface", fla_rwkv6.to_blinkdl(tensors, tied), fla_rwkv6.read_config(config), layout="fla_rwkv6"
        )
    huggingface.check_norm_bias(names, config)
    tensors = huggingface.to_blinkdl(tensors, tied)
    ours = huggingface.default_epsilon(tensors) | huggingface.read_config(config)
    return Checkpoint("huggingface", tensors, ours, layout=_transformers_layout(names))
