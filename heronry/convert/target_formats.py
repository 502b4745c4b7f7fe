"""The formats that a model can be converted to, and how a file name shows which."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

SUFFIXES = {".pth": "blinkdl", ".safetensors": "safetensors", ".st": "webrwkv", ".gguf": "gguf", ".bin": "ggml"}
FOLDERS = ("heronry", "huggingface", "fla")
VISION = ("vision_rwkv",)  # for picture models: a .pth under the authors' names
PLAIN_ONLY = ("huggingface", "fla", "gguf", "ggml", "webrwkv")  # of RWKV-7 without DeepEmbed
GRAPHS = ("onnx", "onnx-step")  # written only, never read
ALL = (*SUFFIXES.values(), *FOLDERS, *VISION, *GRAPHS)


def format_of(target: Path) -> str:
    """The format that the suffix of a target stands for."""
    if target.suffix in SUFFIXES:
        return SUFFIXES[target.suffix]
    if target.suffix == ".onnx":
        return "onnx"
    if target.suffix and not target.is_dir() and target.suffix[1:].isalpha():
        raise InputError(f"{target}: no known format has the suffix {target.suffix}; name the format with --to")
    return "heronry"
