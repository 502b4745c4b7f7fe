"""Folders and files of relatives of RWKV that heronry does not run, told by their config.json or first bytes, and what
they are. Those told by the names of their tensors are in models/registry.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InputError, show

# model_type, architecture or rwkv_architecture, in lower case, and what it is
HYBRIDS = {
    "rwkv7qwen2": "QRWKV7 (RADLADS), a converted Qwen2",
    "rwkv6qwen2": "QRWKV6, a converted Qwen2",
    "arwkv7": "ARWKV, a converted Qwen",
    "rwkv_hybrid": "ARWKV, a converted Qwen",
    "hxa079": "HRWKV (hxa079), RWKV-7 with attention layers",
    "hxa07a": "HRWKV (hxa07A), RWKV-7 with attention layers",
    "cxa076": "cxa076, RWKV-7 with a Qwen channel mix",
    "any2rwkv": "an Any2RWKV conversion of another model",
}
STATES = (b"\xa4\x64name", b"\xa4\x62id")  # CBOR: a map of four, and a key of an InitState
MODELS = (b"\x67context", b"\x64info")  # keys of a model


def check_config(config: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """InputError if a config.json of Hugging Face's is that of something else: a hybrid, an unknown relative, or
    weights quantized in a way of transformers.

    known: the values of model_type that are read, and their classes.
    """
    kind, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str | None):
        raise InputError(f"config.json has the model_type {show(kind)}; expected a name")
    words = [kind, config.get("rwkv_architecture"), *(architectures if isinstance(architectures, list) else [])]
    text = " ".join(str(word).lower() for word in words)
    for name, what in HYBRIDS.items():
        if name in text or name in text.replace("rwkvhybrid", "rwkv_hybrid"):
            raise InputError(f"the folder holds {what}, which is not supported")
    if kind not in known and "rwkv" in text:
        first = f"model_type {show(kind)}" if kind else f"architectures {show(architectures)}"
        raise InputError(f"the folder holds a relative of RWKV ({first}) that heronry does not run")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        name = method if isinstance(method, str) else "quantization_config"
        raise InputError(f"the weights are quantized ({name}); use the original model")
    if config.get("rwkv7_w4_info"):
        raise InputError("the weights are quantized for sglang (rwkv7_w4_info); use the original model")


def check_names(names: Iterable[str]) -> None:
    """InputError if a file with these names, prefixes included, is of a layout that others resemble."""
    names = list(names)
    if "rwkv7.embeddings.weight" in names and any(".attention." in name for name in names):
        raise InputError("a draft of RWKV-7 for transformers with .attention. in its names, which is not supported")


def check_head(head: bytes) -> None:
    """InputError if a file with these first bytes is one of the servers' own.

    head: its first bytes, a few hundred.
    """
    if head.startswith(b"SQLite format 3\0"):
        raise InputError("a database, such as rwkv_lightning keeps of its sessions; it holds no model")
    if head.startswith(b"version https://git-lfs.github.com/"):
        raise InputError("a pointer of Git LFS, not the file itself; `git lfs pull` downloads it")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise InputError("a web page, not a model; download the file itself")
    if head.startswith(STATES):
        raise InputError("a state prefab of Ai00's, which is not supported; save the state as .st or .state")
    if head.lstrip()[:1] == b"{" and (b'"shape"' in head or b'"data"' in head):
        raise InputError("a state as Ai00 answers it in JSON, which is not supported; save the state as .st or .state")
    if head[:1] in (b"\xa5", b"\xbf") and any(key in head for key in MODELS):
        raise InputError("a prefab of web-rwkv or Ai00, which may change with every version; use the .st")
