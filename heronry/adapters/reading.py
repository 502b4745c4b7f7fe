"""One door for adapters of every layout: which one a file or folder is, what it holds, and reading it for a model."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import formats
from ..errors import InputError
from ..formats import safetensors_file
from ..models import Model
from . import peft_folder, rwkv_lightning, rwkv_peft
from .adapter import Adapter, attach_adapter, check_adapter, merge_adapter

PEFT, LIGHTNING, TRAINING, RWKV_PEFT = "peft", "rwkv_lightning", "rwkv_lightning, training", "RWKV-PEFT"


def identify_adapter(path: str | Path) -> str | None:
    """The layout of an adapter; None for anything else, also for what cannot be read."""
    path = Path(path).expanduser()
    if path.is_dir():
        files = {
            peft_folder.SETTINGS: PEFT,
            peft_folder.WEIGHTS: PEFT,
            rwkv_lightning.SETTINGS: LIGHTNING,
            rwkv_lightning.TRAINING: TRAINING,
        }
        return next((layout for name, layout in files.items() if (path / name).is_file()), None)
    if path.name == peft_folder.WEIGHTS:
        return PEFT
    names: list[str] = []
    if path.is_file() and zipfile.is_zipfile(path):
        with suppress(InputError):
            names = list(formats.read(path).tensors)
    suffixes = {
        (rwkv_lightning.MASTER,): TRAINING,
        (rwkv_lightning.D,): LIGHTNING,
        (*rwkv_peft.LORA, *rwkv_peft.MISS): RWKV_PEFT,
    }
    return next((layout for ends, layout in suffixes.items() if any(name.endswith(ends) for name in names)), None)


def read_adapter(
    path: str | Path,
    model: Model,
    *,
    alpha: float | None = None,
    pissa_init: str | Path | None = None,
    base_file: str | Path | None = None,
) -> Adapter:
    """Reads an adapter for `model`: LoRA, DoRA or MiSS, in a folder of peft, in the files of rwkv_lightning or in one
    of RWKV-PEFT.

    Args:
        path: the file or folder.
        model: the base model, with or without adapters.
        alpha, pissa_init: what a file of RWKV-PEFT with LoRA does not say, see `read_rwkv_peft`.
        base_file: the checkpoint of the model, see `read_lightning`.

    Returns:
        The adapter, which fits the model.

    Raises:
        InputError: a missing or damaged file, an unsupported kind of adapter, or an adapter of another model (by its
            fingerprint, or without one by the names and shapes of its tensors).
    """
    path = Path(path).expanduser()
    try:
        layout = identify_adapter(path)
        if layout is None:
            if path.is_file():
                formats.read(path)  # says what is wrong with a damaged one
            raise InputError(
                "not an adapter of peft, rwkv_lightning or RWKV-PEFT" if path.exists() else "no such file or folder"
            )
        if layout != RWKV_PEFT and (alpha is not None or pissa_init is not None):
            raise InputError("--alpha and --pissa-init are for LoRA and PiSSA in files of RWKV-PEFT")
        if layout == PEFT:
            adapter = peft_folder.read_peft(path if path.is_dir() else path.parent, model)
        elif layout == RWKV_PEFT:
            adapter = rwkv_peft.read_rwkv_peft(path, alpha, pissa_init)
        else:
            adapter = rwkv_lightning.read_lightning(path, None if base_file is None else Path(base_file))
        check_adapter(adapter, model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return adapter


def apply_adapter(model: Model, path: str | Path, base_file: str | Path | None = None) -> Adapter:
    """Applies an adapter to a model, in place: merged into plain weights, beside packed ones, which cannot change.

    Args:
        model: the base model that the adapter was trained on.
        path, base_file: see `read_adapter`.

    Returns:
        The adapter, with its notes.

    Raises:
        InputError: see `read_adapter`; also for a model that already has adapters.
    """
    if model.adapted_from is not None:
        raise InputError("the model already has adapters")
    adapter = read_adapter(path, model, base_file=base_file)
    if model.quantization is None:
        merge_adapter(model, adapter)
    else:
        try:
            attach_adapter(model, adapter)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        model.requires_grad_(False)
    return adapter


def restore_adapter(model: Model, folder: str | Path) -> None:
    """Loads the adapter in a folder of peft into the adapters that a model already has."""
    peft_folder.load_adapter_weights(model, read_adapter(folder, model))


def describe_adapter(path: str | Path) -> dict[str, Any] | None:
    """What an adapter is, by name, read without its model; None for anything else."""
    path = Path(path).expanduser()
    layout = identify_adapter(path)
    if layout is None:
        return None
    settings: dict[str, Any] = {}
    header: dict[str, str] = {}
    if layout == PEFT:
        folder = path if path.is_dir() else path.parent
        settings = peft_folder.read_settings(folder / peft_folder.SETTINGS)
        if not (folder / peft_folder.WEIGHTS).is_file():
            raise InputError(f"has no {peft_folder.WEIGHTS}")
        tensors = safetensors_file.read(folder / peft_folder.WEIGHTS)
        header = safetensors_file.read_metadata(folder / peft_folder.WEIGHTS)
    else:
        names = (rwkv_lightning.WEIGHTS, rwkv_lightning.TRAINING)
        file = next((path / name for name in names if (path / name).is_file()), path)
        tensors = formats.read(file).tensors
        if layout != RWKV_PEFT:
            settings = rwkv_lightning.read_settings(file)
            end = rwkv_lightning.MASTER if layout == TRAINING else rwkv_lightning.D
            tensors = {name: x for name, x in tensors.items() if name.endswith(end)}
    is_lora = any(".lora_" in name for name in tensors)
    method = "LoRA" if is_lora else "MiSS"
    if settings.get("use_dora"):
        method = "DoRA"
    blocks = {name: x for name, x in tensors.items() if not is_lora and not name.endswith(".weight")}
    first = next(iter(blocks.values()), None)
    if first is not None and len(first.shape) == 3:
        method = "MiSS, bat" + (" by column of blocks" if layout == RWKV_PEFT else "")
    elif settings.get("init_weights") == "mini":
        method = "MiSS, mini"
    rank = settings.get("r", settings.get("rank"))
    if rank is None and (x := next((x for name, x in tensors.items() if name.endswith(".lora_A")), first)) is not None:
        rank = x.shape[-1] if layout in (LIGHTNING, TRAINING) or len(x.shape) == 3 else x.shape[0]
    return {
        "kind": "adapter",
        "layout": layout,
        "method": method,
        "rank": rank,
        "alpha": settings.get("lora_alpha", settings.get("alpha")),
        "matrices": len({_stem(name) for name in (tensors if is_lora else blocks)}),
        "parameters": sum(x.numel() for x in tensors.values()),
        "size": sum(x.nbytes for x in tensors.values()),
        "base model": settings.get("base_model_name_or_path"),
        "fingerprint": header.get("fingerprint", settings.get("base_fingerprint")),
    }


def _stem(name: str) -> str:
    for part in (".lora_", ".miss_", ".bone", ".disha", ".weight.D"):
        name = name.partition(part)[0]
    return name
