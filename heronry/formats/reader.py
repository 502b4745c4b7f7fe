"""Reads a checkpoint of any format. The format is recognised by the first bytes and the tensors, not by the name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from . import folder, ggml, gguf, huggingface, pth, safetensors_file, vision_rwkv, webrwkv
from .lazy_tensor import Tensors
from .prefixes import strip_prefixes


@dataclass
class Checkpoint:
    """The contents of a file or folder.

    Attributes:
        format: "blinkdl", "safetensors", "heronry", "huggingface", "fla", "gguf", "ggml", "webrwkv" or "vision_rwkv".
        tensors: under BlinkDL's names.
        config: the settings stored with the tensors, as heronry's config.json has them, notes for LLM included; empty
            for a format that stores none.
        tokenizer: the text of a tokenizer.json stored inside the file.
        template: the chat template stored inside the file, in Jinja or as a name of llama.cpp's.
    """

    format: str
    tensors: Tensors
    config: Mapping[str, Any]
    tokenizer: str | None = None
    template: str | None = None


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
            head = file.read(9)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error
    if not head:
        raise InputError("the file is empty")
    if gguf.is_gguf(head):
        return Checkpoint("gguf", *gguf.read(path))
    if ggml.is_ggml(head):
        return Checkpoint("ggml", ggml.read(path), {})
    if safetensors_file.is_safetensors(head):  # before .pth: the length in front may have any bytes
        return _recognise_names("safetensors", safetensors_file.read(path), safetensors_file.read_metadata(path))
    if pth.is_pth(head):
        return _recognise_names("blinkdl", pth.read(path))
    if path.suffix in (".safetensors", ".st"):
        return _recognise_names("safetensors", safetensors_file.read(path))
    raise InputError("not a .pth, .safetensors, GGUF or rwkv.cpp file")


def _recognise_names(format: str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """The checkpoint of a file that holds nothing but tensors: their names show the format.

    metadata: of a safetensors file.
    """
    is_official = f"{huggingface.PREFIX}emb.weight" in tensors
    tensors = strip_prefixes(tensors)
    if is_official or "embeddings.weight" in tensors:
        return Checkpoint("huggingface", huggingface.to_blinkdl(tensors), {})
    if metadata is not None and webrwkv.is_webrwkv(tensors, metadata):
        return Checkpoint("webrwkv", webrwkv.to_blinkdl(tensors), {})
    if vision_rwkv.is_vision_rwkv(tensors):
        return Checkpoint("vision_rwkv", vision_rwkv.to_heronry(tensors), {})
    return Checkpoint(format, tensors, {})


def _read_folder(path: Path) -> Checkpoint:
    if any((path / name).is_file() for name in ("adapter_config.json", "adapter.json")):
        raise InputError("the folder holds an adapter; give its model, and this folder with --adapter")
    if not (path / "config.json").is_file():
        raise InputError(f"no config.json in the folder{folder.training_shards_hint(path)}")
    config = read_json(path / "config.json")
    if "model_type" in config:
        tensors = huggingface.to_blinkdl(folder.read(path), bool(config.get("tie_word_embeddings")))
        layout = huggingface.layout_of(config)
        return Checkpoint(layout, tensors, huggingface.read_config(config))
    return Checkpoint("heronry", strip_prefixes(folder.read(path)), config)
