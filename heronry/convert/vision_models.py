"""Models of pictures in another format: a folder or .safetensors of ours, the authors' .pth, ONNX.

They are small, so that they are in memory as a whole; the proof is the logits of a fixed picture.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import formats
from ..checkpoint import DTYPES, assemble, notes, save
from ..errors import InputError
from ..files import atomic_write
from ..formats import vision_rwkv
from ..formats.lazy_tensor import space_for
from ..models import VisionModel

if TYPE_CHECKING:
    from .conversion import Converted

KNOWN = ("heronry", "safetensors", "blinkdl", "vision_rwkv", "onnx")


def convert_pictures(
    checkpoint: formats.Checkpoint, source: Path, target: Path, to: str, dtype: str | None
) -> Converted:
    """As `convert`; a .pth ("blinkdl" or "vision_rwkv") has the authors' names."""
    from .conversion import Converted

    if to not in KNOWN:
        raise InputError(f"{source}: a model of pictures has no place in {to}; choose one of {', '.join(KNOWN)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    if to == "onnx" and dtype not in (None, "float32"):
        raise InputError(f"ONNX files are float32, not {dtype}")
    try:
        wide = torch.float32 if to == "onnx" else DTYPES.get(dtype or "")
        model = assemble(checkpoint.tensors, checkpoint.config, wide, kind=VisionModel)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    plain = type(model.config).from_shapes({name: x.shape for name, x in model.state_dict().items()})
    training = {name: getattr(model.config, name) for name in ("drop_path", "decay_lr", "init_values")}
    lost = [name for name, x in asdict(replace(plain, **training)).items() if x != getattr(model.config, name)]
    if to not in ("heronry", "onnx") and lost:
        raise InputError(f"{target}: a {to} file has no place for {lost[0]} = {getattr(model.config, lost[0])!r}")
    exact = dtype is None or DTYPES[dtype] == next(iter(checkpoint.tensors.values())).dtype
    picture = torch.linspace(-2, 2, 3 * model.config.image_size**2).sin().reshape(1, 3, *[model.config.image_size] * 2)
    wanted = _logits(assemble(checkpoint.tensors, checkpoint.config, kind=VisionModel), picture)
    space_for(sum(p.nbytes for p in model.parameters()), target)
    tensors = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
    if to == "heronry":
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: is there already; give the name of a new folder")
        save(model, target, notes=notes(checkpoint.config))
        again = _read(target, picture)
    else:
        with atomic_write(target) as part:
            if to == "onnx":
                from . import onnx

                onnx.write_pictures(model, part, target.name)
                again = _run(part, picture)
            else:
                if to == "safetensors":
                    save_file(tensors, part, metadata={"format": "pt"})
                else:
                    torch.save({"state_dict": vision_rwkv.from_ours(tensors)}, part)
                again = _read(part, picture)
            difference = (again - wanted).abs().max().item()
            if not difference <= (1e-4 if to == "onnx" else 0) * wanted.abs().max().item() and exact:
                raise InputError(f"{target}: not written, for its logits are {difference:.2g} away from {source}'s")
    difference, largest = (again - wanted).abs().max().item(), wanted.abs().max().item()
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    return Converted(to, size, difference, largest)


def _read(path: Path, picture: Tensor) -> Tensor:
    checkpoint = formats.read(path)
    return _logits(assemble(checkpoint.tensors, checkpoint.config, kind=VisionModel), picture)


@torch.inference_mode()
def _logits(model: VisionModel, picture: Tensor) -> Tensor:
    return model.float()(picture) if model.pos_embed.dtype != torch.float64 else model(picture.double()).float()


def _run(path: Path, picture: Tensor) -> Tensor:
    """What onnxruntime makes of it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": picture.numpy()})[0])
