"""LoRA and DoRA adapters: low-rank changes to the matrices of a frozen model, in the two files of Hugging Face's peft.

LoRA (arXiv 2106.09685) adds the product of two thin matrices to a matrix W; DoRA (arXiv 2402.09353) also learns the
length m of each row of the sum:

    W' = W + s B A        W' = m (W + s B A) / |W + s B A|        s = alpha / rank

- for inference they are merged into the weights, where they cost nothing
- packed weights cannot be merged, so there they stay beside the matrices (inject.py, which needs peft)
- adapter_config.json and adapter_model.safetensors are those of peft; the metadata of the latter also hold the
  fingerprint of the base model and the adapter's notes
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

from ..checkpoint import read_notes
from ..errors import InputError, show
from ..files import atomic_write, read_json
from ..formats import huggingface, safetensors_file
from ..models import Model
from ..models.layers import widen
from .matrices import adaptable_matrices, replace_weights

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft calls the model inside its wrapper
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

READ_KEYS = ("r", "lora_alpha", "use_rslora", "use_dora", "peft_type", "init_lora_weights")
# keys that change nothing for a trained adapter; which matrices it is for is known from its tensors
IGNORED_KEYS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("runtime_config", "megatron_core", "qalora_group_size"),
)
INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # those that leave the base matrix unchanged


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter folder, checked against a model.

    Attributes:
        matrices: names of the matrices it changes.
        tensors: A [rank, in], B [out, rank] and, for DoRA, MAGNITUDE [out] as "{matrix}.{A, B or MAGNITUDE}".
        rank: of A and B.
        scale: the factor of B A.
        dora: whether rows are scaled to MAGNITUDE.
        notes: see `heronry.save`.
    """

    matrices: tuple[str, ...]
    tensors: dict[str, Tensor]
    rank: int
    scale: float
    dora: bool
    notes: dict[str, Any]


@torch.no_grad()
def merge_adapter(model: Model, adapter: Adapter) -> None:
    """Merges an adapter into the plain weights of a model, in place, which gives the model another fingerprint.

    Computes in float32 (float64 for a float64 model) and rounds once, to the dtype of the weights.

    Raises:
        InputError: a matrix would contain NaN or infinity. The model is then unchanged.
    """
    matrices = adaptable_matrices(model)
    merged = {}
    for name in adapter.matrices:
        weight = matrices[name].weight
        wide = widen(weight)
        tensors = {part: adapter.tensors[f"{name}.{part}"].to(wide) for part in _parts(adapter.dora)}
        matrix = wide + adapter.scale * (tensors[B] @ tensors[A])
        if adapter.dora:
            matrix *= (tensors[MAGNITUDE] / torch.linalg.norm(matrix, dim=1))[:, None]
        merged[f"{name}.weight"] = matrix.to(weight.dtype)
    replace_weights(model, merged)


def save_adapter(model: Model, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the adapter of a model that `inject_adapter` has extended, in the two files of peft.

    Both files are complete before the first one replaces an old one.

    Args:
        model: with adapters.
        folder: created if it does not exist.
        notes: see `heronry.save`.

    Raises:
        InputError: the model has no adapters.
    """
    from peft import get_peft_model_state_dict  # an optional package

    if model.adapted_from is None:
        raise InputError("this model has no adapters")
    state_dict = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in state_dict.items()}
    header = {"format": "pt", "fingerprint": model.adapted_from, "notes": json.dumps(dict(notes or {}))}
    settings = adapter_settings(model)
    folder = Path(folder).expanduser()
    with atomic_write(folder / WEIGHTS) as weights_file, atomic_write(folder / SETTINGS) as settings_file:
        save_file(tensors, weights_file, metadata=header)
        settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_settings(model: Any) -> dict[str, Any]:
    """The content of adapter_config.json for a model with adapters (peft adds `peft_config` to it)."""
    settings = model.peft_config["default"].to_dict()
    return {key: sorted(x) if isinstance(x, set) else x for key, x in settings.items()} | {"inference_mode": True}


def restore_adapter(model: Model, folder: str | Path) -> None:
    """Loads the adapter in `folder` into the adapters that a model already has."""
    load_adapter_weights(model, read_adapter(folder, model))


def load_adapter_weights(model: Model, adapter: Adapter) -> None:
    """Copies the tensors of `adapter` into the adapters that a model already has."""
    from peft import set_peft_model_state_dict  # an optional package

    set_peft_model_state_dict(model, adapter.tensors)


def read_adapter(folder: str | Path, model: Model) -> Adapter:
    """Reads an adapter for `model`: LoRA, rank-stabilised LoRA or DoRA, as `save_adapter` and peft write them.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        model: the base model, with or without adapters.

    Returns:
        The adapter, which fits the model.

    Raises:
        InputError: a missing or damaged file, an unsupported kind of adapter, or an adapter of another model (by its
            fingerprint, or without one by the names and shapes of its tensors).
    """
    folder = Path(folder).expanduser()
    try:
        if not folder.is_dir():
            raise InputError("no such folder")
        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise InputError(f"the folder has no {name}")
        settings = _read_settings(folder / SETTINGS)
        header = safetensors_file.read_metadata(folder / WEIGHTS)
        base = model.adapted_from or model.fingerprint
        if header.get("fingerprint", base) != base:
            base_name = settings.get("base_model_name_or_path")
            raise InputError("this adapter was trained on another model" + (f", {base_name}" if base_name else ""))
        tensors = _read_tensors(folder / WEIGHTS)
        matrices = _check_tensors(tensors, settings, model)
        notes = read_notes(header)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    return Adapter(matrices, tensors, rank, scale, bool(settings.get("use_dora")), notes)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter as "{matrix}.{A, B or MAGNITUDE}", under BlinkDL's names of the matrices, whichever
    class of the model the adapter was trained in."""
    tensors: dict[str, Tensor] = {}
    for name, x in safetensors_file.read(file).items():
        matrix, dot, part = name.partition(".lora_")
        key = next(iter(huggingface.to_blinkdl({f"{matrix}.weight": x}))).removesuffix(".weight") + dot + part
        if key in tensors:
            raise InputError(f"{file.name}: {key} occurs twice, also as {name}")
        tensors[key] = x.read()
    return tensors


def _read_settings(file: Path) -> dict[str, Any]:
    """The content of an adapter_config.json; InputError unless it describes a LoRA or DoRA adapter."""
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        kind = show(settings.get("peft_type"))
        raise InputError(f"{file.name}: unsupported peft_type {kind}; only 'LORA' is supported")
    rank, alpha, initial = settings.get("r"), settings.get("lora_alpha"), settings.get("init_lora_weights", True)
    if type(rank) is not int or rank < 1:
        raise InputError(f"{file.name}: r must be a positive whole number, got {show(rank)}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{file.name}: lora_alpha must be a number, got {show(alpha)}")
    if initial not in INITIALISATIONS:
        raise InputError(f"{file.name}: unsupported init_lora_weights {show(initial)}, which changes the base matrices")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(settings.get(key), bool | None):
            raise InputError(f"{file.name}: {key} must be true or false, got {show(settings[key])}")
    for key, value in settings.items():
        if key not in (*READ_KEYS, *IGNORED_KEYS) and value and value != "none":
            raise InputError(f"{file.name}: {key} = {show(value)} is not supported")
    return settings


def _parts(dora: bool) -> tuple[str, ...]:
    """The names of the tensors of one adapted matrix."""
    return (A, B, MAGNITUDE) if dora else (A, B)


def _check_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """The names of the adapted matrices; InputError unless every tensor is there, finite and of the right shape."""
    matrices = adaptable_matrices(model)
    rank = settings["r"]
    parts = _parts(bool(settings.get("use_dora")))
    names: list[str] = []
    for key in tensors:
        name = next((key.removesuffix(f".{part}") for part in parts if key.endswith(f".{part}")), None)
        if name is None:
            raise InputError(f"{WEIGHTS}: unexpected tensor {key}, which is not part of such an adapter")
        if name not in matrices:
            raise InputError(f"an adapter of another model: it changes {name}, which this {model.name} does not have")
        if name not in names:
            names.append(name)
    if not names:
        raise InputError(f"{WEIGHTS} is empty")
    for name in names:
        rows, columns = matrices[name].out_features, matrices[name].in_features
        for part, shape in zip(parts, ([rank, columns], [rows, rank], [rows]), strict=False):
            if f"{name}.{part}" not in tensors:
                raise InputError(f"{WEIGHTS} has no {name}.{part}")
            x = tensors[f"{name}.{part}"]
            if list(x.shape) != shape:
                raise InputError(
                    f"an adapter of another model: {name}.{part} has shape {list(x.shape)}, expected {shape}"
                )
            if not x.is_floating_point() or not x.isfinite().all():
                raise InputError(f"{name}.{part} contains NaN or infinity")
    return tuple(names)
