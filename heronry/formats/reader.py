"""Reads a checkpoint of any format. What a file is, its first bytes and its tensors tell, not its name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import ggml, gguf, huggingface, vision_rwkv, webrwkv
from .lazy_tensor import Tensors, read_folder, read_pth, read_safetensors


@dataclass
class Checkpoint:
    """The contents of a file or folder.

    Attributes:
        format: "blinkdl", "safetensors", "heronry", "huggingface", "gguf", "ggml", "webrwkv" or "vision_rwkv".
        tensors: under BlinkDL's names.
        config: the settings stored with the tensors, as heronry's config.json has them, notes for LLM included; empty
            for a format that stores none.
        tokenizer: the text of a tokenizer.json stored inside the file.
    """

    format: str
    tensors: Tensors
    config: Mapping[str, Any]
    tokenizer: str | None = None


def read(path: Path) -> Checkpoint:
    """The tensors of a checkpoint, mapped or read when they are wanted.

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
    if head.startswith(b"GGUF"):
        return Checkpoint("gguf", *gguf.read(path))
    if ggml.is_ggml(head):
        return Checkpoint("ggml", ggml.read(path), {})
    if head[8:] == b"{":  # before it stands a length, whose first bytes may be anything
        return _named("safetensors", read_safetensors(path))
    if head.startswith((b"PK", b"\x80")):
        return _named("blinkdl", read_pth(path))
    if path.suffix in (".safetensors", ".st"):
        return _named("safetensors", read_safetensors(path))
    raise InputError("neither a .pth nor a .safetensors file, nor GGUF, nor an rwkv.cpp file")


def _named(format: str, tensors: Tensors) -> Checkpoint:
    """A bare file of tensors: whose names are these?"""
    if "rwkv.embeddings.weight" in tensors or "model.embeddings.weight" in tensors:
        return Checkpoint("huggingface", huggingface.to_blinkdl(tensors), {})
    if webrwkv.is_webrwkv(tensors):
        return Checkpoint("webrwkv", webrwkv.to_blinkdl(tensors), {})
    if vision_rwkv.is_vision_rwkv(tensors):
        return Checkpoint("vision_rwkv", vision_rwkv.to_ours(tensors), {})
    return Checkpoint(format, tensors, {})


def _read_folder(folder: Path) -> Checkpoint:
    if (folder / "adapter_config.json").is_file():
        raise InputError("the folder holds an adapter; give its model, and this folder with --adapter")
    if not (folder / "config.json").is_file():
        pieces = any(folder.glob("shard-*.safetensors"))
        what = ", only the pieces of a run, which writes its model at the end" if pieces else ""
        raise InputError(f"the folder has no config.json{what}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise InputError("config.json is no JSON object")
    if "model_type" in config:
        tensors = huggingface.to_blinkdl(read_folder(folder), bool(config.get("tie_word_embeddings")))
        return Checkpoint("huggingface", tensors, huggingface.describe(config))
    return Checkpoint("heronry", read_folder(folder), config)
