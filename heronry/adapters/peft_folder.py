"""Adapters as Hugging Face's peft writes them: LoRA, DoRA and MiSS.

- adapter_config.json holds the settings, adapter_model.safetensors the tensors `base_model.model.{matrix}.{part}`
- the metadata of the latter also hold, where it was written here, the fingerprint of the base model and the notes
- the peft_type BONE of older versions is read as MiSS, which it became
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
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
from .adapter import Adapter, Change
from .lora import LoRA
from .matrices import adaptable_matrices
from .miss import MiSS, MiSSLinear

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft calls the model inside its wrapper
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
BLOCK = "miss_block"
PART = re.compile(r"\.((?:lora|miss|bone)_.*)")  # of a tensor's name, behind that of the matrix

READ_KEYS = {
    "LORA": ("r", "lora_alpha", "use_rslora", "use_dora", "peft_type", "init_lora_weights"),
    "MISS": ("r", "mini_r", "peft_type", "init_weights"),
}
# keys that change nothing for a trained adapter; which matrices it is for is known from its tensors
IGNORED_KEYS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "miss_dropout"),
    *("bone_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
)
INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # those that leave the base matrix unchanged
VARIANTS = (True, False, "mini", "bat")  # of MiSS


def matrix_name(name: str) -> str:
    """BlinkDL's name of a matrix, whichever class of the model the adapter was trained in."""
    x = huggingface.to_blinkdl({f"{name}.weight": torch.empty(0)})  # type: ignore[dict-item]
    return next(iter(x)).removesuffix(".weight")


def read_peft(folder: Path, model: Model) -> Adapter:
    """The adapter in a folder; InputError unless it describes one that we have and was trained on this model, as far
    as its fingerprint says. What its tensors fit is checked later."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"the folder has no {name}")
    settings = read_settings(folder / SETTINGS)
    header = safetensors_file.read_metadata(folder / WEIGHTS)
    base = model.adapted_from or model.fingerprint
    if header.get("fingerprint", base) != base:
        base_name = settings.get("base_model_name_or_path")
        raise InputError("this adapter was trained on another model" + (f", {base_name}" if base_name else ""))
    tensors = _read_tensors(folder / WEIGHTS)
    if not tensors:
        raise InputError(f"{WEIGHTS} is empty")
    if settings["peft_type"] == "LORA":
        changes: dict[str, Change] = {**_lora_changes(tensors, settings)}
        return Adapter(changes, notes=read_notes(header))
    return Adapter(_miss_changes(tensors, settings, model), notes=read_notes(header))


def _read_tensors(file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter by the name of the matrix and of the part."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, x in safetensors_file.read(file).items():
        found = PART.search(name)
        if found is None:
            raise InputError(f"{WEIGHTS}: unexpected tensor {name}, which is not part of such an adapter")
        parts = tensors.setdefault(matrix_name(name[: found.start()]), {})
        part = found[1].replace("bone_", "miss_")
        if part in parts:
            raise InputError(f"{file.name}: {matrix_name(name[: found.start()])}.{part} occurs twice, also as {name}")
        parts[part] = x.read()
    return tensors


def _check_parts(name: str, parts: Mapping[str, Tensor], expected: tuple[str, ...]) -> None:
    for part in expected:
        if part not in parts:
            raise InputError(f"{WEIGHTS} has no {name}.{part}")
    for part in parts:
        if part not in expected:
            raise InputError(f"{WEIGHTS}: unexpected tensor {name}.{part}, which is not part of such an adapter")


def _lora_changes(tensors: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any]) -> dict[str, LoRA]:
    rank, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    changes = {}
    for name, parts in tensors.items():
        _check_parts(name, parts, (A, B, MAGNITUDE) if settings.get("use_dora") else (A, B))
        for part, axis in ((A, 0), (B, 1)):
            shape = list(parts[part].shape)
            if len(shape) != 2 or shape[axis] != rank:
                raise InputError(f"{name}.{part} has shape {shape}, but the rank in {SETTINGS} is {rank}")
        changes[name] = LoRA(parts[A], parts[B], scale, parts.get(MAGNITUDE))
    return changes


def _miss_changes(
    tensors: Mapping[str, Mapping[str, Tensor]], settings: Mapping[str, Any], model: Model
) -> dict[str, Change]:
    matrices = adaptable_matrices(model)
    rank, variant, mini_r = settings["r"], settings.get("init_weights", True), settings.get("mini_r", 1)
    changes: dict[str, Change] = {}
    for name, parts in tensors.items():
        _check_parts(name, parts, (BLOCK,))
        shape = list(parts[BLOCK].shape)
        if name in matrices:  # else said later
            rows = matrices[name].out_features
            columns = {"bat": rank, "mini": mini_r}.get(variant, rows)
            expected = [rows // rank, rank, rank] if variant == "bat" else [rank, columns]
            if shape != expected:
                raise InputError(
                    f"{name}.{BLOCK} has shape {shape}, expected {expected} with r = {rank} and "
                    f"init_weights = {json.dumps(variant)}, for {rows} outputs"
                )
        changes[name] = MiSS(parts[BLOCK])
    return changes


def read_settings(file: Path) -> dict[str, Any]:
    """The content of an adapter_config.json; InputError unless it describes LoRA, DoRA or MiSS. The peft_type is "LORA"
    or "MISS"."""
    settings = read_json(file)
    kind = settings.get("peft_type")
    if kind not in ("LORA", "MISS", "BONE"):
        raise InputError(f"{file.name}: unsupported peft_type {show(kind)}; only LORA, MISS and BONE are supported")
    settings["peft_type"] = kind = "MISS" if kind == "BONE" else kind
    rank = settings.get("r")
    if type(rank) is not int or rank < 1:
        raise InputError(f"{file.name}: r must be a positive whole number, got {show(rank)}")
    if kind == "LORA":
        _check_lora(file, settings)
    else:
        _check_miss(file, settings)
    for key, value in settings.items():
        if key not in (*READ_KEYS[kind], *IGNORED_KEYS) and value and value != "none":
            raise InputError(f"{file.name}: {key} = {show(value)} is not supported")
    return settings


def _check_lora(file: Path, settings: Mapping[str, Any]) -> None:
    alpha, initial = settings.get("lora_alpha"), settings.get("init_lora_weights", True)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{file.name}: lora_alpha must be a number, got {show(alpha)}")
    if initial not in INITIALISATIONS:
        raise InputError(f"{file.name}: unsupported init_lora_weights {show(initial)}, which changes the base model")
    for key in ("use_dora", "use_rslora"):
        if type(settings.get(key, False)) is not bool:
            raise InputError(f"{file.name}: {key} must be true or false, got {show(settings[key])}")


def _check_miss(file: Path, settings: Mapping[str, Any]) -> None:
    variant, mini_r = settings.get("init_weights", True), settings.get("mini_r", 1)
    if not any(variant is known or (isinstance(variant, str) and variant == known) for known in VARIANTS):
        raise InputError(f"{file.name}: init_weights must be true, false, mini or bat, got {show(variant)}")
    if type(mini_r) is not int or mini_r < 1:
        raise InputError(f"{file.name}: mini_r must be a positive whole number, got {show(mini_r)}")


def save_adapter(model: Model, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the adapter of a model that `inject_adapter` or `inject_miss` has extended, in the two files of peft.

    Args:
        model: with adapters.
        folder: created if it does not exist.
        notes: see `heronry.save`.

    Raises:
        InputError: the model has no adapters that were trained here.
    """
    if not hasattr(model, "peft_config"):
        raise InputError("this model has no adapters")
    tensors = {f"{name}.{BLOCK}": m.miss_block for name, m in model.named_modules() if isinstance(m, MiSSLinear)}
    if not tensors:
        from peft import get_peft_model_state_dict  # an optional package

        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    _write_files(Path(folder).expanduser(), tensors, adapter_settings(model), model.adapted_from, notes or {})


def write_peft(adapter: Adapter, model: Model, folder: Path) -> None:
    """Writes an adapter that was read from another layout as peft has it.

    Args:
        adapter: checked against `model`, the base model.
        folder: created if it does not exist.

    Raises:
        InputError: several ranks, kinds or scales, a bat of RWKV-PEFT, or parameters that are no matrices: peft's
            layout has no place for them.
    """
    if adapter.parameters:
        raise InputError(f"peft has no place for {min(adapter.parameters)}; merge this adapter instead")
    matrices = adaptable_matrices(model)
    tensors: dict[str, Tensor] = {}
    kinds: set[tuple[Any, ...]] = set()
    for name, change in adapter.changes.items():
        if isinstance(change, LoRA):
            parts = {A: change.a, B: change.b, MAGNITUDE: change.magnitude}
            tensors |= {f"{name}.{part}": x for part, x in parts.items() if x is not None}
            kinds.add(("LORA", change.rank, change.scale * change.rank, change.magnitude is not None))
            continue
        if change.is_bat and change.axis == "in":
            raise InputError(
                f"{name} has a bat by columns of blocks, as RWKV-PEFT trains it, which peft has not; merge it instead"
            )
        tensors[f"{name}.{BLOCK}"] = change.block if change.scale == 1 else change.scale * change.block
        mini = not change.is_bat and change.block.shape[1] != matrices[name].out_features
        variant = "bat" if change.is_bat else "mini" if mini else True
        kinds.add(("MISS", change.rank, variant, change.block.shape[1] if mini else 1))
    if len(kinds) > 1:
        raise InputError("peft's layout has one rank, scale and kind for all matrices; merge this adapter instead")
    kind, rank, first, second = kinds.pop()
    settings: dict[str, Any] = {"peft_type": kind, "r": rank, "target_modules": sorted(adapter.changes)}
    settings |= {"bias": "none", "inference_mode": True}
    if kind == "LORA":
        settings |= {"lora_alpha": first, "use_dora": second}
    else:
        settings |= {"init_weights": first, "mini_r": second}
    _write_files(folder, tensors, settings, model.fingerprint, adapter.notes)


def _write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    base_fingerprint: str | None,
    notes: Mapping[str, Any],
) -> None:
    """Writes tensors by "{matrix}.{part}" and settings. Both files are complete before the first one replaces an old
    one."""
    tensors = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in tensors.items()}
    header = {"format": "pt", "notes": json.dumps(dict(notes))}
    if base_fingerprint is not None:
        header["fingerprint"] = base_fingerprint
    with atomic_write(folder / WEIGHTS) as weights_file, atomic_write(folder / SETTINGS) as settings_file:
        save_file(tensors, weights_file, metadata=header)
        settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def adapter_settings(model: Any) -> dict[str, Any]:
    """The content of adapter_config.json for a model with adapters (peft adds `peft_config` to it)."""
    settings = model.peft_config["default"].to_dict()
    return {key: sorted(x) if isinstance(x, set) else x for key, x in settings.items()} | {"inference_mode": True}


@torch.no_grad()
def load_adapter_weights(model: Model, adapter: Adapter) -> None:
    """Copies an adapter into the adapters that `inject_adapter` or `inject_miss` has given to a model."""
    from peft import set_peft_model_state_dict  # an optional package

    tensors: dict[str, Tensor] = {}
    for name, change in adapter.changes.items():
        if isinstance(change, LoRA):
            parts = {A: change.a, B: change.b, MAGNITUDE: change.magnitude}
            tensors |= {f"{name}.{part}": x for part, x in parts.items() if x is not None}
        else:
            layer = model.get_submodule(name)
            assert isinstance(layer, MiSSLinear)
            layer.miss_block.copy_(change.block)
    if tensors:
        set_peft_model_state_dict(model, tensors)
