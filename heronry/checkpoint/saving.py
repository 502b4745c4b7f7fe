"""Models into folders: config.json and model.safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..errors import InputError
from ..files import atomic_write
from ..models import Network
from ..models.layers import PackedLinear
from .notes import NOTES
from .packed_layout import rows_and_scales

FILE_SUFFIXES = (".pth", ".safetensors", ".st", ".gguf", ".bin", ".onnx")


def check_folder_name(folder: Path) -> None:
    """InputError where a model's folder cannot be: at a file, or under the name of one."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the name of a folder")
    if folder.suffix in FILE_SUFFIXES and not folder.exists():
        raise InputError(
            f"{folder}: a model is saved as a folder; give a name without {folder.suffix}, and `heronry convert` makes "
            "a file of it"
        )


def save(
    model: Network,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and model.safetensors, and a copy of the tokenizer's file as tokenizer.json (.txt, ...).

    All files are written before the first one replaces an old one.

    Args:
        model: with or without quantized matrices; a model with adapters is refused.
        folder: is created if it does not exist.
        tokenizer_file: of the model.
        notes: for LLM "chat_template" (a name in text/chat_templates.py) and "opening_tokens" (the ids in front of
            every text in training); for pictures "labels" (the names of the classes).

    Raises:
        InputError: an unknown note, a model with adapters, a folder or tokenizer that is none, the name of a file.
    """
    unknown = [key for key in notes or {} if key not in NOTES]
    if unknown:
        raise InputError(f"unknown note {unknown[0]!r}; known are {', '.join(NOTES)}")
    if model.adapted_from is not None:
        raise InputError(
            "this model has adapters beside its matrices: save_adapter saves them, `heronry merge` merges them"
        )
    model.check_has_weights()
    folder = Path(folder).expanduser()
    check_folder_name(folder)
    tokenizer = None if tokenizer_file is None else Path(tokenizer_file).expanduser()
    if tokenizer is not None and not tokenizer.is_file():
        raise InputError(f"{tokenizer}: tokenizer file not found")
    model = getattr(model, "_orig_mod", model)  # inside a wrapper of torch.compile
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    first = {x.data_ptr(): name for name, x in reversed(tensors.items())}
    for name, x in tensors.items():
        if first[x.data_ptr()] != name:  # a head that is the embedding: safetensors writes no memory twice
            tensors[name] = x.clone()
    config = {"model": model.name, **asdict(model.config), **(notes or {})}
    if model.quantization is not None:
        config |= {"quantization": model.quantization, "fingerprint": model.fingerprint}
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                tensors[f"{name}.weight"], tensors[f"{name}.scales"] = rows_and_scales(module)
    config_text = json.dumps(config, indent=2) + "\n"
    with atomic_write(folder / "config.json") as config_file, atomic_write(folder / "model.safetensors") as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        config_file.write_text(config_text)
        if tokenizer is not None:
            with atomic_write(folder / f"tokenizer{tokenizer.suffix}") as copy:
                shutil.copyfile(tokenizer, copy)
