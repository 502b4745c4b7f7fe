"""The adapters of RWKV-PEFT: a .pth with `NAME.lora_A` [rank, in] and `NAME.lora_B` [out, rank] for the matrices, and,
under their own names, whatever else was trained (norms, mixes, decays).

The file does not say everything. LoRA needs the alpha of the run: W + alpha / rank B A. PiSSA (arXiv 2404.02948)
trained what it had first taken out of the matrices, so that it needs the file with that beginning,
`NAME.init_lora_A` and `NAME.init_lora_B`: W - B0 A0 + B A.
Source: merge.py of RWKV-PEFT.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import formats
from ..errors import InputError
from ..formats.lazy_tensor import LazyTensor, Tensors
from ..models import Model
from ..models.layers import widen
from .lora import adaptable


@torch.no_grad()
def merge_file(model: Model, file: str | Path, alpha: float | None = None, beginning: str | Path | None = None) -> None:
    """Changes the weights of a model as the adapter in `file` says; from then on it is one of its own.

    Args:
        alpha: of a LoRA: what the run was given as --lora_alpha.
        beginning: of a PiSSA: the file of its initial matrices.

    Raises:
        InputError: no such file, something else, an adapter of another model, or neither or both of the two.
    """
    if model.quantization is not None or model.adapted_from is not None:
        raise InputError("an adapter is merged into plain weights; load the model without quantize and adapters")
    if (alpha is None) == (beginning is None):
        raise InputError("say how to merge: alpha= (--alpha) for LoRA, or beginning= (--beginning) for PiSSA")
    try:
        tensors = _read(file)
        names = sorted(key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A"))
        if not names:
            raise InputError("no adapter of RWKV-PEFT (it holds no lora_A)")
        initial = {} if beginning is None else _read(beginning)
        changed = {f"{name}.weight": _changed(model, name, tensors, initial, alpha) for name in names}
        parameters = dict(model.named_parameters())
        for key, x in tensors.items():
            if key.endswith((".lora_A", ".lora_B")):
                continue
            if key not in parameters or x.numel() != parameters[key].numel():
                raise InputError(f"an adapter of another model: it holds {key} {list(x.shape)}")
            changed[key] = x.read().reshape(parameters[key].shape)
        for key, merged in changed.items():
            if not merged.isfinite().all():
                raise InputError(f"{key}, merged, holds numbers that are infinite or none")
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    for key, merged in changed.items():
        parameters[key].copy_(merged)
    model._fingerprint = None


def _read(file: str | Path) -> Tensors:
    path = Path(file).expanduser()
    tensors = formats.read(path).tensors
    if any(".disha" in key or ".bone" in key for key in tensors):
        raise InputError(f"{path}: holds a DiSHA or Bone adapter; LoRA and PiSSA are read")
    return tensors


def _changed(model: Model, name: str, tensors: Tensors, initial: Tensors, alpha: float | None) -> torch.Tensor:
    """The matrix after its adapter, in float32."""
    matrices = adaptable(model)
    if name not in matrices:
        raise InputError(f"an adapter of another model: it changes {name}, which this {model.name} does not have")
    weight = matrices[name].weight
    a, b = _pair(tensors, name, "lora", weight.shape)
    if alpha is not None:
        return widen(weight) + alpha / a.shape[0] * (b @ a)
    a0, b0 = _pair(initial, name, "init_lora", weight.shape)
    return widen(weight) - b0 @ a0 + b @ a


def _pair(tensors: Tensors, name: str, kind: str, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of a matrix of this shape."""
    found: list[LazyTensor] = []
    for part in ("A", "B"):
        key = f"{name}.{kind}_{part}"
        if key not in tensors:
            raise InputError(f"{key} is missing")
        found.append(tensors[key])
    a, b = found
    if len(a.shape) != 2 or (b.shape[0], a.shape[1]) != tuple(shape) or b.shape[1:] != a.shape[:1]:
        shapes = f"{kind}_A {list(a.shape)} and {kind}_B {list(b.shape)}"
        raise InputError(f"an adapter of another model: {name} has {shapes} for a matrix {list(shape)}")
    return a.read().float(), b.read().float()
