"""Picture models in another format: a folder or .safetensors of heronry's, the authors' .pth, ONNX.

They are small enough to be in memory as a whole; the logits of a fixed picture are compared.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import formats
from ..checkpoint import DTYPES, assemble, save, select_notes
from ..errors import InputError
from ..files import atomic_write, check_free_space
from ..formats import pth, vision_rwkv
from ..models import VisionModel
from . import onnx
from .new_folder import new_folder
from .result import Converted

FORMATS = ("heronry", "safetensors", "blinkdl", "vision_rwkv", "onnx")
TRAINING_SETTINGS = ("drop_path", "decay_lr", "init_values")  # do not change what a trained model computes


def convert_vision_model(
    checkpoint: formats.Checkpoint, source: Path, target: Path, to: str, dtype: str | None
) -> Converted:
    """As `convert`, for a checkpoint read from `source`. A .pth ("blinkdl", "vision_rwkv") gets the authors' names."""
    if to not in FORMATS:
        raise InputError(
            f"{source}: the format {to} does not support picture models; choose one of {', '.join(FORMATS)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    if to == "onnx" and dtype not in (None, "float32"):
        raise InputError(f"ONNX files are float32, not {dtype}")
    target_dtype = torch.float32 if to == "onnx" else DTYPES.get(dtype or "")
    try:
        model = assemble(checkpoint.tensors, checkpoint.config, target_dtype, kind=VisionModel)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if to not in ("heronry", "onnx"):
        _check_readable_from_shapes(model, target, to)
    picture = _sample_picture(model.config.image_size)
    expected, rounded = _compute_logits(checkpoint, picture), _logits(model, picture)
    check_free_space(sum(p.nbytes for p in model.parameters()), target)
    stamp = json.dumps([str(source.resolve()), os.stat(source).st_mtime_ns, dtype])
    with new_folder(target, stamp) if to == "heronry" else atomic_write(target) as part:
        if to == "heronry":
            save(model, part, notes=select_notes(checkpoint.config))
            logits = _compute_logits(formats.read(part), picture)
        elif to == "onnx":
            onnx.write_vision_model(model, part, target.name)
            logits = onnx.run_vision_graph(part, picture)
        else:
            tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
            if to == "safetensors":
                save_file(tensors, part, metadata={"format": "pt"})
            else:
                pth.save({"state_dict": vision_rwkv.from_heronry(tensors)}, part)
            logits = _compute_logits(formats.read(part), picture)
        result = Converted.compare(to, part, expected, logits)
        difference = (logits - rounded).abs().max().item()
        if not difference <= (1e-4 if to == "onnx" else 0) * result.largest:
            raise InputError(f"{target}: not written: read again its logits are off by {difference:.2g}")
    return result


def _check_readable_from_shapes(model: VisionModel, target: Path, to: str) -> None:
    """InputError if the file would be read as another model: with no config.json, shapes must show all settings."""
    guessed = type(model.config).from_shapes({name: x.shape for name, x in model.state_dict().items()})
    guessed = replace(guessed, **{name: getattr(model.config, name) for name in TRAINING_SETTINGS})
    for name, value in asdict(guessed).items():
        if value != getattr(model.config, name):
            raise InputError(f"{target}: a {to} file cannot store {name} = {getattr(model.config, name)!r}")


def _sample_picture(size: int) -> Tensor:
    """A fixed picture, float32 [1, 3, size, size]."""
    return torch.linspace(-2, 2, 3 * size**2).sin().reshape(1, 3, size, size)


def _compute_logits(checkpoint: formats.Checkpoint, picture: Tensor) -> Tensor:
    """The logits of a picture in float32, [1, classes]."""
    return _logits(assemble(checkpoint.tensors, checkpoint.config, kind=VisionModel), picture)


@torch.inference_mode()
def _logits(model: VisionModel, picture: Tensor) -> Tensor:
    """The same of a model, which is not changed; computed in float32, for a float64 model in float64."""
    if model.pos_embed.dtype == torch.float64:
        logits: Tensor = model(picture.double())
    else:
        logits = copy.deepcopy(model).float()(picture)
    return logits.float()
