""".pth files of RWKV-7 with quantized matrices and their scales beside them (vllm-rwkv, forks of Albatross).

The matrix keeps its name K, and a scale is K with a suffix:

- .scale float16 [N]: int8 K, a scale a row; heronry's int8 holds it without loss
- .fp8_scale: float8 K, one scale
- .nf4_b_scale float8 [N, K / 16] and .nvfp4_t_scale: two E2M1 numbers in a byte, the even column low ("nf4" is not that
  of bitsandbytes); K was multiplied by .awq_scale [K] where there is one; .res_fp8 and .res_fp8_scale are the remainder

All but int8 become float32 when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import InputError
from . import packed_int8
from .lazy_tensor import LazyTensor, Tensors

SCALE, FP8, BLOCKS, WHOLE, AWQ = ".scale", ".fp8_scale", ".nf4_b_scale", ".nvfp4_t_scale", ".awq_scale"
REMAINDER = (".res_fp8", ".res_fp8_scale")
SUFFIXES = (SCALE, FP8, BLOCKS, WHOLE, AWQ, *REMAINDER)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = (torch.float8_e4m3fn,)
META = "meta"  # a dict about the file, not a tensor


def is_scaled(names: Iterable[str]) -> bool:
    """Whether some of these names are those of scales."""
    names = set(names)
    return any(name.endswith(SUFFIXES) and _owner(name) in names for name in names)


def read(tensors: Tensors) -> Tensors:
    """The matrices under their names: int8 packed as heronry's, the others as float32."""
    owners: dict[str, dict[str, LazyTensor]] = {}
    for name, x in tensors.items():
        if name.endswith(SUFFIXES):
            owners.setdefault(_owner(name), {})[name.removeprefix(_owner(name))] = x
    result: Tensors = {}
    for name, x in tensors.items():
        if name in owners:
            _add(result, name, x, owners.pop(name))
        elif not name.endswith(SUFFIXES):
            result[name] = x
    if owners:
        raise InputError(f"{next(iter(owners))} is missing, of which the file holds scales")
    return result


def _owner(name: str) -> str:
    """The name of the matrix that a scale belongs to."""
    return name.rpartition(".")[0]


def _add(result: Tensors, name: str, x: LazyTensor, scales: dict[str, LazyTensor]) -> None:
    kinds = scales.keys()
    if x.dtype == torch.int8 and kinds == {SCALE}:
        packed_int8.add_matrix(result, name, x, scales[SCALE], x.shape[-1] if x.shape else 1)
    elif x.dtype in FLOAT8 and kinds == {FP8}:
        result[name] = LazyTensor.computed(_times_one, x, scales[FP8])
    elif x.dtype == torch.uint8 and {BLOCKS, WHOLE} <= kinds and scales[BLOCKS].dtype in FLOAT8:
        value = LazyTensor.computed(_nvfp4, x, scales[BLOCKS], scales[WHOLE])
        if set(REMAINDER) <= kinds:
            value = LazyTensor.computed(_plus, value, *(scales[suffix] for suffix in REMAINDER))
        if AWQ in kinds:
            value = LazyTensor.computed(_divided, value, scales[AWQ])
        result[name] = value
    else:
        what = f"{str(x.dtype).removeprefix('torch.')} with {', '.join(sorted(kinds))}"
        raise InputError(f"{name} is quantized in a way that is not supported ({what}); use the original checkpoint")


def _times_one(x: Tensor, scale: Tensor) -> Tensor:
    return x.float() * scale.float().reshape(())


def _nvfp4(q: Tensor, blocks: Tensor, whole: Tensor) -> Tensor:
    """[N, K / 2] bytes -> [N, K]."""
    codes = torch.stack([q & 15, q >> 4], dim=-1).flatten(1)
    levels = torch.tensor(E2M1, device=q.device)[codes.int()]
    scaled = torch.unflatten(levels, 1, (-1, 16)) * blocks.float()[..., None]
    return scaled.flatten(1) * whole.float().reshape(())


def _plus(x: Tensor, remainder: Tensor, scale: Tensor) -> Tensor:
    return x + _times_one(remainder, scale).reshape(x.shape)


def _divided(x: Tensor, scales: Tensor) -> Tensor:
    return x / scales.float().reshape(1, x.shape[1])
