"""Adapters of RWKV-PEFT and OpenMOSE's RWKV-LM-RLHF: a .pth with tensors by the names of the adapted matrices and,
under their own names, all other trained parameters (norms, mixes, decays).

- LoRA: `NAME.lora_A` [rank, in] and `NAME.lora_B` [out, rank]. The file is not complete: it also needs the alpha of the
  run. PiSSA (arXiv 2404.02948) trains a part that it first takes out of the matrices, so it needs the file with that
  part, `NAME.init_lora_A` and `NAME.init_lora_B`: W - B0 A0 + B A
- MiSS: `NAME.disha`, once `NAME.bone`, [rank, out] or, of bat, [in / rank, rank, rank]. Its blocks belong to the
  columns of blocks of the matrix, unlike peft's

Source: merge.py of RWKV-PEFT.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import formats
from ..errors import InputError
from ..formats.lazy_tensor import Tensors
from .adapter import Adapter, Change
from .lora import LoRA
from .miss import MiSS
from .peft_folder import matrix_name

MISS = (".disha", ".bone")
LORA = (".lora_A", ".lora_B")
INITIAL = (".init_lora_A", ".init_lora_B")


def read_rwkv_peft(file: Path, alpha: float | None = None, pissa_init: str | Path | None = None) -> Adapter:
    """The adapter in a file.

    Args:
        alpha: for LoRA: the --lora_alpha of the run.
        pissa_init: for PiSSA: the file of its initial matrices.

    Raises:
        InputError: damaged, one half of a LoRA is missing, neither or both of alpha and pissa_init are given for one.
    """
    tensors = formats.read(file).tensors
    changes: dict[str, Change] = {}
    parameters = {}
    is_lora = any(key.endswith(LORA) for key in tensors)
    if is_lora and (alpha is None) == (pissa_init is None):
        raise InputError("give either alpha= (--alpha) for LoRA, or pissa_init= (--pissa-init) for PiSSA")
    if not is_lora and (alpha is not None or pissa_init is not None):
        raise InputError("alpha and pissa_init are for LoRA and PiSSA; MiSS has neither")
    initial = None if pissa_init is None else formats.read(Path(pissa_init).expanduser()).tensors
    for key, lazy in tensors.items():
        name, _, part = key.rpartition(".")
        if key.endswith(MISS):
            if matrix_name(name) in changes:
                raise InputError(f"{name} has two adapters, also {key}")
            changes[matrix_name(name)] = MiSS(lazy.read(), axis="in")
        elif part in ("lora_A", "lora_B"):
            if part == "lora_A" or f"{name}.lora_A" not in tensors:
                changes[matrix_name(name)] = _lora_change(tensors, initial, name, alpha)
        else:
            parameters[key] = lazy.read()
    for key in parameters:
        if matrix_name(key.removesuffix(".weight")) in changes:
            raise InputError(f"holds {key} and also {key.removesuffix('.weight')}.lora_A")
    for key in initial or {}:
        name = key.rpartition(".")[0]
        if key.endswith(INITIAL) and matrix_name(name) not in changes:
            raise InputError(f"not of the same run as {pissa_init}: {name} is only there")
    return Adapter(changes, parameters)


def _lora_change(tensors: Tensors, initial: Tensors | None, name: str, alpha: float | None) -> LoRA:
    for kind, found in (("lora", tensors), ("init_lora", initial)):
        for key in (f"{name}.{kind}_A", f"{name}.{kind}_B"):
            if found is not None and key not in found:
                raise InputError(f"{key} is missing")
    a, b = (tensors[f"{name}{part}"].read() for part in LORA)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise InputError(f"{name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, which do not fit each other")
    if initial is None:
        assert alpha is not None
        return LoRA(a, b, alpha / len(a))
    a0, b0 = (initial[f"{name}.init_{part[1:]}"].read() for part in LORA)
    if a0.shape != a.shape or b0.shape != b.shape:
        raise InputError(f"{name} has init_lora_A {list(a0.shape)} for lora_A {list(a.shape)}")
    return LoRA(torch.cat([a, a0]), torch.cat([b, -b0], dim=1), 1.0)
