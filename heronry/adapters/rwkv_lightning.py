"""MiSS adapters of rwkv_lightning: for inference a folder with adapter.json and adapter.pth, or one .pth that carries
the same JSON as a member miss.json of its archive; and the training.pth of a run.

Tensors are `blocks.N.{att or ffn}.{matrix}.weight.D`, [out, r]: transposed against peft, and scaled by alpha / rank. In
a training.pth they are called `….D.master`, float32, with their moments beside them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..errors import InputError, show
from ..files import atomic_write, hash_file
from ..formats.lazy_tensor import Tensors
from ..models import Model
from .adapter import Adapter
from .matrices import adaptable_matrices
from .miss import MiSS

log = logging.getLogger("heronry")

SETTINGS, WEIGHTS, TRAINING, CHECKPOINT = "adapter.json", "adapter.pth", "training.pth", "checkpoint.json"
MEMBER = "miss.json"  # in the archive
D, MASTER = ".weight.D", ".weight.D.master"
EXPECTED = {"format_version": 1, "kind": "inference_adapter", "method": "miss", "layout": "modulo_rank_zero_pad"}
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
MAX_RANK = 1024
MAX_JSON = 8 << 20  # bytes
TARGETS = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


def read_lightning(path: Path, base_file: Path | None = None) -> Adapter:
    """The adapter in a folder or a .pth.

    base_file: the checkpoint of the base model, if it is still known: a warning says so where it is another file than
    the one that the adapter was trained on.

    Raises:
        InputError: a missing or damaged file, or another version.
    """
    file = next((path / name for name in (WEIGHTS, TRAINING) if (path / name).is_file()), path)
    if file.is_dir():
        raise InputError(f"the folder has no {WEIGHTS}")
    tensors = formats.read(file).tensors
    settings = read_settings(file)
    masters = {name.removesuffix(MASTER): x.read() for name, x in tensors.items() if name.endswith(MASTER)}
    blocks = masters or _read_blocks(tensors, settings)
    rank, scale = _rank_and_scale(settings, blocks)
    for name, x in blocks.items():
        if x.ndim != 2 or x.shape[1] != rank:
            raise InputError(f"{name}{D} has shape {list(x.shape)}, expected [out, {rank}]")
    _compare_base(settings.get("base_fingerprint"), base_file)
    return Adapter({name: MiSS(x.T, scale) for name, x in blocks.items()})


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON that belongs to a .pth: from inside its archive, or from beside it.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    text: str | None = None
    try:
        with zipfile.ZipFile(file) as archive:
            member = next((name for name in archive.namelist() if name.rpartition("/")[2] == MEMBER), None)
            if member is not None and archive.getinfo(member).file_size > MAX_JSON:
                raise InputError(f"{member} in its archive is larger than {MAX_JSON >> 20} MB, which no adapter needs")
            if member is not None:
                text = archive.read(member).decode()
        beside = next((x for x in map(file.with_name, (SETTINGS, CHECKPOINT)) if x.is_file()), file)
        if text is None and beside != file:
            text = beside.read_text(encoding="utf-8")
        settings = None if text is None else json.loads(text)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise InputError(f"the JSON of the adapter cannot be read ({error})") from error
    if settings is None:
        raise InputError(f"the JSON of the adapter is missing: {MEMBER} in its archive, or {SETTINGS} beside it")
    if isinstance(settings, dict) and settings.get("kind") == "miss_training_checkpoint":
        settings = settings.get("config")  # of training checkpoints without JSON inside
    elif isinstance(settings, dict):
        for key, expected in EXPECTED.items():
            if settings.get(key) != expected:
                raise InputError(f"{key} in its JSON is {show(settings.get(key))}; only {expected!r} is supported")
    if not isinstance(settings, dict):
        raise InputError(f"the JSON of the adapter must be an object, got {show(settings)}")
    return settings


def _read_blocks(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """D [out, r] of each matrix, checked against the JSON of an adapter for inference."""
    blocks = {name.removesuffix(D): x.read() for name, x in tensors.items() if name.endswith(D)}
    targets = settings.get("targets")
    if not isinstance(targets, list) or not all(
        isinstance(x, dict) and isinstance(x.get("name"), str) for x in targets
    ):
        raise InputError(f"targets in its JSON must be a list of objects with names, got {show(targets)}")
    names = [target["name"].removesuffix(".D").removesuffix(".weight") for target in targets]
    for name, target in zip(names, targets, strict=True):
        if name not in blocks:
            raise InputError(f"{name}{D} is missing")
        if target.get("shape", list(blocks[name].shape)) != list(blocks[name].shape):
            shapes = f"{list(blocks[name].shape)}, but {show(target['shape'])} in its JSON"
            raise InputError(f"{name}{D} has shape {shapes}")
    if unnamed := blocks.keys() - set(names):
        raise InputError(f"{min(unnamed)}{D} is not among the targets in its JSON")
    version = settings.get("content_version")
    if version is not None and version != content_version(settings, [blocks[name] for name in names]):
        log.warning("heronry: the adapter is not what its content_version says: damaged, or changed by hand")
    return blocks


def _rank_and_scale(settings: Mapping[str, Any], blocks: Mapping[str, Tensor]) -> tuple[int, float]:
    first = next(iter(blocks.values()), None)
    if first is None:
        raise InputError("holds no adapter of any matrix")
    rank = settings.get("rank", first.shape[-1])
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank in its JSON must be a whole number from 1 to {MAX_RANK}, got {show(rank)}")
    alpha = settings.get("alpha", rank)
    for key, value in (("alpha", alpha), ("scale", settings.get("scale", 0))):
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{key} in its JSON must be a number, got {show(value)}")
    scale = alpha / rank
    if not math.isclose(settings.get("scale", scale), scale, rel_tol=1e-6):
        raise InputError(f"scale in its JSON is {settings['scale']}, but alpha / rank is {scale}")
    return rank, scale


def _compare_base(expected: Any, base_file: Path | None) -> None:
    if base_file is not None and base_file.is_file() and isinstance(expected, str) and hash_file(base_file) != expected:
        log.warning("heronry: %s is not the file that the adapter was trained on (its sha256 differs)", base_file)


def content_version(settings: Mapping[str, Any], blocks: list[Tensor]) -> str:
    """The sha256 of the JSON without this entry, followed by the numbers of all D in the order of the targets."""
    about = {key: x for key, x in settings.items() if key != "content_version"}
    digest = hashlib.sha256(canonical_json(about).encode())
    for x in blocks:
        digest.update(x.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """As jsoncpp writes it, with which rwkv_lightning computes the hash anew: compact, keys sorted, 17 digits."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{canonical_json(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical_json, value)) + "]"
    if isinstance(value, float):
        text = f"{value:.17g}"
        return text if "." in text or "e" in text else f"{text}.0"
    return json.dumps(value)


def write_lightning(
    adapter: Adapter,
    model: Model,
    target: Path,
    base_file: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes MiSS for rwkv_lightning: one file if `target` ends in .pth, else a folder.

    Args:
        adapter: checked against `model`.
        base_file: the .pth that rwkv_lightning will load; it compares its sha256.
        dtype: float16 or bfloat16.

    Raises:
        InputError: LoRA, bat, several ranks, matrices that rwkv_lightning does not adapt, numbers too large for dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"rwkv_lightning reads adapters in float16 and bfloat16, not in {dtype}")
    if not base_file.is_file():
        raise InputError(f"{base_file}: give the .pth that rwkv_lightning loads: the adapter names its sha256")
    if adapter.parameters:
        raise InputError(f"rwkv_lightning adapts matrices only, not {min(adapter.parameters)}")
    matrices = adaptable_matrices(model)
    targets, tensors = [], {}
    ranks = {change.rank for change in adapter.changes.values()}
    scales = {change.scale for change in adapter.changes.values()}
    for name, change in sorted(adapter.changes.items(), key=lambda item: (int(item[0].split(".")[1]), item[0])):
        if not isinstance(change, MiSS) or change.is_bat or len(ranks) > 1 or len(scales) > 1:
            raise InputError("rwkv_lightning reads MiSS of one rank only, without bat; merge this adapter instead")
        if name.split(".", 2)[-1] not in TARGETS:
            raise InputError(f"rwkv_lightning does not adapt {name}; train with model.targets={json.dumps(TARGETS)}")
        rows, columns = matrices[name].out_features, matrices[name].in_features
        block = change.block.T.repeat(rows // change.block.shape[1], 1).to(dtype).contiguous()
        if not block.abs().max() <= 65504:  # it computes in float16
            raise InputError(f"the adapter of {name} has numbers that are too large for float16")
        tensors[f"{name}{D}"] = block
        layer, short = name.split(".", 2)[1:]
        shape = [rows, change.rank]
        targets.append(
            {"name": f"{name}{D}", "layer": int(layer), "target": f"{short}.weight", "in_features": columns}
            | {"shape": shape}
        )
    (rank,), (scale,) = ranks, scales
    about: dict[str, Any] = EXPECTED | {"dtype": DTYPES[dtype], "rank": rank, "alpha": scale * rank, "scale": scale}
    about |= {"base_fingerprint": hash_file(base_file), "targets": targets}
    about["content_version"] = content_version(about, list(tensors.values()))
    text = canonical_json(about)
    if target.suffix == ".pth":
        with atomic_write(target) as part:
            with open(part, "wb") as file:
                torch.save(tensors, file)  # under "archive/", where rwkv_lightning looks; by its path, under its name
            with zipfile.ZipFile(part, "a", zipfile.ZIP_STORED) as archive:
                archive.writestr(f"archive/{MEMBER}", text)
        return
    with atomic_write(target / WEIGHTS) as weights_file, atomic_write(target / SETTINGS) as settings_file:
        torch.save(tensors, weights_file)
        settings_file.write_text(text, encoding="utf-8")
