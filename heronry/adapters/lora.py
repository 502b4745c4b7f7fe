"""Adapters: low-rank changes to the matrices of a frozen model, in the two files of Hugging Face's `peft`.

LoRA (arXiv 2106.09685) adds to a matrix W a product of two thin ones, DoRA (arXiv 2402.09353) also learns the length m
of each row of the sum:

    W' = W + s B A        W' = m (W + s B A) / |W + s B A|        s = alpha / rank

- merged into the weights they cost nothing at inference: that is how they are used
- packed weights have no room for them, so there they stay beside the matrices (inject.py, which needs peft)
- adapter_config.json and adapter_model.safetensors are peft's own; the metadata of the latter also name the model by
  its fingerprint, and hold its notes
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import check_note
from ..errors import InputError
from ..files import replacing
from ..formats.lazy_tensor import metadata, read_safetensors
from ..models import Model
from ..models.layers import Linear, PackedLinear, widen

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft calls the model inside its wrapper
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

# What else an adapter_config.json says and nobody needs: which matrices it is for, its tensors tell.
TOLD = ("r", "lora_alpha", "use_rslora", "use_dora", "peft_type", "init_lora_weights")
IDLE = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
)
INITIAL = (True, False, "gaussian", "orthogonal")  # ways to begin that leave the matrix itself alone


@dataclass(frozen=True)
class Adapter:
    """What a folder holds, known to fit a model.

    tensors: by the matrix's name and A [rank, in], B [out, rank] or MAGNITUDE [out].
    """

    names: tuple[str, ...]  # of the matrices
    tensors: dict[str, Tensor]
    rank: int
    scale: float
    dora: bool
    notes: dict[str, Any]


def apply(model: Model, folder: str | Path) -> Adapter:
    """Puts the adapter in a folder on a model, in place: merged, or beside the matrices where they are packed.

    Raises:
        InputError: as `read_adapter`; a model with adapters already; DoRA on packed weights; no peft for those.
    """
    if model.adapted_from is not None:
        raise InputError("the model has adapters already")
    adapter = read_adapter(folder, model)
    if model.quantization is None:
        merge(model, adapter)
        return adapter
    from .inject import attach

    try:
        # alpha as it gives this scale, however the adapter came by it
        attach(model, adapter.rank, adapter.scale * adapter.rank, dora=adapter.dora, targets=adapter.names)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    _set(model, adapter)
    model.requires_grad_(False)
    return adapter


@torch.no_grad()
def merge(model: Model, adapter: Adapter) -> None:
    """Changes the matrices of a model that are not packed; from then on it is one of its own, with another
    fingerprint. In float32 (float64 for a float64 model), rounded once to the dtype of the weights."""
    matrices = adaptable(model)
    for name in adapter.names:
        weight = matrices[name].weight
        wide = widen(weight)
        own = {part: adapter.tensors[f"{name}.{part}"].to(wide) for part in _parts(adapter.dora)}
        changed = wide + adapter.scale * (own[B] @ own[A])
        if adapter.dora:
            changed *= (own[MAGNITUDE] / torch.linalg.norm(changed, dim=1))[:, None]
        if not weight.copy_(changed).isfinite().all():
            raise InputError(f"{name}.weight, merged, holds numbers that are infinite or none")
    model._fingerprint = None


def save_adapter(model: Model, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the adapter of a model that `attach` put one on, as peft would; both files are written before the first
    takes the place of an old one. `notes` as for `heronry.save`."""
    from peft import get_peft_model_state_dict

    if model.adapted_from is None:
        raise InputError("this model has no adapters")
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in found.items()}
    about = {"format": "pt", "fingerprint": model.adapted_from, "notes": json.dumps(dict(notes or {}))}
    settings = settings_of(model)
    folder = Path(folder).expanduser()
    with replacing(folder / WEIGHTS) as weights, replacing(folder / SETTINGS) as told:
        save_file(tensors, weights, metadata=about)
        told.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def settings_of(model: Any) -> dict[str, Any]:
    """The adapter_config.json of a model with adapters."""
    told = model.peft_config["default"].to_dict()
    return {key: sorted(x) if isinstance(x, set) else x for key, x in told.items()} | {"inference_mode": True}


def restore_adapter(model: Model, folder: str | Path) -> None:
    """Gives the adapters that a model has the numbers in a folder."""
    _set(model, read_adapter(folder, model))


def _set(model: Model, adapter: Adapter) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, adapter.tensors)


def read_adapter(folder: str | Path, model: Model) -> Adapter:
    """The adapter in a folder that `save_adapter` or peft wrote: LoRA, rank-stabilised LoRA or DoRA, for this model.

    Raises:
        InputError: a missing or damaged file, another kind of adapter, one of another model: told by the fingerprint,
            or without one by names and shapes.
    """
    folder = Path(folder).expanduser()
    try:
        if not folder.is_dir():
            raise InputError("no such folder")
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"the folder has no {name}")
        settings = _settings(folder / SETTINGS)
        about = metadata(folder / WEIGHTS)
        base = model.adapted_from or model.fingerprint
        if about.get("fingerprint", base) != base:
            of = settings.get("base_model_name_or_path")
            raise InputError("this adapter was trained on another model" + (f", {of}" if of else ""))
        tensors = {name.removeprefix(PREFIX): x.read() for name, x in read_safetensors(folder / WEIGHTS).items()}
        names = _fitting(tensors, settings, model)
        notes = json.loads(about.get("notes", "{}"))
        for key, value in notes.items():
            check_note(key, value)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return Adapter(names, tensors, rank, scale, bool(settings.get("use_dora")), notes)


def _settings(file: Path) -> dict[str, Any]:
    """An adapter_config.json that asks for nothing but LoRA or DoRA."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file.name} cannot be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise InputError(f"{file.name} tells of an adapter of the kind {kind!r}; only LORA is read")
    rank, alpha, initial = settings.get("r"), settings.get("lora_alpha"), settings.get("init_lora_weights", True)
    if type(rank) is not int or rank < 1:
        raise InputError(f"{file.name} says r = {rank!r}, which is no rank")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{file.name} says lora_alpha = {alpha!r}, which is no number")
    if initial not in INITIAL:
        raise InputError(f"{file.name} says init_lora_weights = {initial!r}, for matrices that were changed themselves")
    for key, value in settings.items():
        if key not in (*TOLD, *IDLE) and value and value != "none":
            raise InputError(f"{file.name} asks for {key} = {value!r}, which is not supported")
    return settings


def _parts(dora: bool) -> tuple[str, ...]:
    return (A, B, MAGNITUDE) if dora else (A, B)


def _fitting(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """The names of the matrices; InputError unless all tensors are there and of the right shapes."""
    matrices = adaptable(model)
    rank = settings["r"]
    parts = _parts(bool(settings.get("use_dora")))
    names: list[str] = []
    for key in tensors:
        name = next((key.removesuffix(f".{part}") for part in parts if key.endswith(f".{part}")), None)
        if name is None:
            raise InputError(f"{WEIGHTS} holds {key}, which is no part of such an adapter")
        if name not in matrices:
            raise InputError(f"an adapter of another model: it changes {name}, which this {model.name} does not have")
        if name not in names:
            names.append(name)
    if not names:
        raise InputError(f"{WEIGHTS} holds nothing")
    for name in names:
        rows, columns = matrices[name].out_features, matrices[name].in_features
        for part, shape in zip(parts, ([rank, columns], [rows, rank], [rows]), strict=False):
            if f"{name}.{part}" not in tensors:
                raise InputError(f"{WEIGHTS} has no {name}.{part}")
            x = tensors[f"{name}.{part}"]
            if list(x.shape) != shape:
                raise InputError(f"an adapter of another model: {name}.{part} is {list(x.shape)} instead of {shape}")
            if not x.is_floating_point() or not x.isfinite().all():
                raise InputError(f"{name}.{part} holds numbers that are infinite or none")
    return tuple(names)


def adaptable(model: Model) -> dict[str, Linear | PackedLinear]:
    """The matrices that adapters can change, by name, whether they have one or not."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, Linear | PackedLinear))
    return {name.removesuffix(".base_layer"): m for name, m in found}
