"""Adapters of RWKV-PEFT: a .pth with `NAME.lora_A` [rank, in] and `NAME.lora_B` [out, rank] for the adapted matrices
and, under their own names, all other trained parameters (norms, mixes, decays).

The file is not complete. LoRA also needs the alpha of the run: W + alpha / rank B A. PiSSA (arXiv 2404.02948) trains
a part that it first takes out of the matrices, so it also needs the file with that part, `NAME.init_lora_A` and
`NAME.init_lora_B`: W - B0 A0 + B A.
Source: merge.py of RWKV-PEFT.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .. import formats
from ..errors import InputError
from ..formats.lazy_tensor import Tensors, same_numbers
from ..models import Model
from ..models.layers import widen
from .matrices import adaptable_matrices, replace_weights


@torch.no_grad()
def merge_rwkv_peft(
    model: Model, file: str | Path, alpha: float | None = None, pissa_init: str | Path | None = None
) -> None:
    """Merges an adapter of RWKV-PEFT into the weights of a model, in place, which gives it another fingerprint.

    Args:
        model: the base model, plain and without adapters.
        file: the .pth of the adapter.
        alpha: for LoRA: the --lora_alpha of the run.
        pissa_init: for PiSSA: the file of its initial matrices.

    Raises:
        InputError: the file is missing, is something else or belongs to another model; neither or both of alpha and
            pissa_init are given. The model is then unchanged.
    """
    if model.quantization is not None or model.adapted_from is not None:
        raise InputError("an adapter is merged into plain weights; load the model without quantize and adapters")
    if (alpha is None) == (pissa_init is None):
        raise InputError("give either alpha= (--alpha) for LoRA, or pissa_init= (--pissa-init) for PiSSA")
    try:
        tensors = _read_adapter(file)
        names = _matrix_names(tensors, "lora")
        if not names:
            raise InputError("not an adapter of RWKV-PEFT (no lora_A in it)")
        initial = {} if pissa_init is None else _read_adapter(pissa_init)
        for name in _matrix_names(initial, "init_lora"):
            if name not in names:
                raise InputError(f"not of the same run as {pissa_init}: {name} is only there")
        merged = {f"{name}.weight": _merged_matrix(model, name, tensors, initial, alpha) for name in names}
        parameters = dict(model.named_parameters())
        for key, lazy in tensors.items():
            if key.endswith((".lora_A", ".lora_B")):
                continue
            if key in merged:
                raise InputError(f"holds {key} and also {key.removesuffix('.weight')}.lora_A")
            if key not in parameters or not same_numbers(lazy.shape, parameters[key].shape):
                raise InputError(f"an adapter of another model: unexpected tensor {key} {list(lazy.shape)}")
            merged[key] = lazy.read().reshape(parameters[key].shape)
        replace_weights(model, merged)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _read_adapter(file: str | Path) -> Tensors:
    """The tensors of a file, by name."""
    path = Path(file).expanduser()
    tensors = formats.read(path).tensors
    if any(".disha" in key or ".bone" in key for key in tensors):
        raise InputError(f"{path}: DiSHA and Bone adapters are not supported, only LoRA and PiSSA")
    return tensors


def _matrix_names(tensors: Tensors, kind: str) -> list[str]:
    """The matrices of which there is an A or a B."""
    ends = (f".{kind}_A", f".{kind}_B")
    return sorted({key[: -len(ends[0])] for key in tensors if key.endswith(ends)})


def _merged_matrix(model: Model, name: str, tensors: Tensors, initial: Tensors, alpha: float | None) -> Tensor:
    """The matrix with its adapter, float32 [out, in]."""
    matrices = adaptable_matrices(model)
    if name not in matrices:
        raise InputError(f"an adapter of another model: it changes {name}, which this {model.name} does not have")
    weight = matrices[name].weight
    a, b = _read_pair(tensors, name, "lora", weight.shape)
    if alpha is not None:
        return widen(weight) + alpha / a.shape[0] * (b @ a)
    a0, b0 = _read_pair(initial, name, "init_lora", weight.shape)
    return widen(weight) - b0 @ a0 + b @ a


def _read_pair(tensors: Tensors, name: str, kind: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float32, of a matrix of this shape."""
    for key in (f"{name}.{kind}_A", f"{name}.{kind}_B"):
        if key not in tensors:
            raise InputError(f"{key} is missing")
    a, b = tensors[f"{name}.{kind}_A"], tensors[f"{name}.{kind}_B"]
    if len(a.shape) != 2 or (b.shape[0], a.shape[1]) != tuple(shape) or b.shape[1:] != a.shape[:1]:
        shapes = f"{kind}_A {list(a.shape)} and {kind}_B {list(b.shape)}"
        raise InputError(f"an adapter of another model: {name} has {shapes} for a matrix {list(shape)}")
    return a.read().float(), b.read().float()
