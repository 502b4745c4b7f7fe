""".pth files of RWKV-7 with quantized matrices and their scales beside them (vllm-rwkv, forks of Albatross).

The matrix keeps its name K, and a scale is K with a suffix:

- .scale float16 [N]: int8 K, a scale a row; heronry's int8 holds it without loss
- .fp8_scale: float8 K, one scale
- .nf4_b_scale float8 [N, K / 16] and .nvfp4_t_scale: two E2M1 numbers in a byte, the even column low ("nf4" is not that
  of bitsandbytes); K was multiplied by .awq_scale [K] where there is one; .res_fp8 and .res_fp8_scale are the residual

All but int8 become float32 when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from . import packed_int8
from .lazy_tensor import LazyTensor, Tensors

SCALE, FP8, BLOCKS, WHOLE, AWQ = ".scale", ".fp8_scale", ".nf4_b_scale", ".nvfp4_t_scale", ".awq_scale"
RESIDUAL, RESIDUAL_SCALE = ".res_fp8", ".res_fp8_scale"
SUFFIXES = (SCALE, FP8, BLOCKS, WHOLE, AWQ, RESIDUAL, RESIDUAL_SCALE)
NVFP4 = ({BLOCKS, WHOLE}, {BLOCKS, WHOLE, AWQ}, {BLOCKS, WHOLE, AWQ, RESIDUAL, RESIDUAL_SCALE})
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = torch.float8_e4m3fn
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

    def need(suffix: str, *shape: int) -> LazyTensor:
        """A scale, which has so many numbers."""
        if scales[suffix].numel() != math.prod(shape):
            raise InputError(f"{name}{suffix} has the shape {list(scales[suffix].shape)} instead of {list(shape)}")
        return scales[suffix].map(partial(torch.reshape, shape=shape))

    if x.dtype == torch.int8 and kinds == {SCALE}:
        packed_int8.add_matrix(result, name, x, scales[SCALE], x.shape[-1] if x.shape else 1)
    elif x.dtype == FLOAT8 and kinds == {FP8}:
        result[name] = LazyTensor.deferred(x.shape, torch.float32, _times, x, need(FP8))
    elif x.dtype == torch.uint8 and kinds in NVFP4 and scales[BLOCKS].dtype == FLOAT8 and len(x.shape) == 2:
        shape = (x.shape[0], 2 * x.shape[1])
        value = _deferred(_nvfp4, x, need(BLOCKS, shape[0], shape[1] // 16), need(WHOLE), shape=shape)
        if RESIDUAL in kinds:
            residual = _deferred(_times, need(RESIDUAL, *shape), need(RESIDUAL_SCALE), shape=shape)
            value = _deferred(torch.add, value, residual, shape=shape)
        if AWQ in kinds:
            value = _deferred(_divided, value, need(AWQ, shape[1]), shape=shape)
        result[name] = value
    else:
        what = f"{str(x.dtype).removeprefix('torch.')} with {', '.join(sorted(kinds))}"
        raise InputError(f"{name} is quantized in a way that is not supported ({what}); use the original checkpoint")


def _deferred(function: Callable[..., Tensor], *inputs: LazyTensor, shape: tuple[int, int]) -> LazyTensor:
    return LazyTensor.deferred(shape, torch.float32, function, *inputs)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    return x.float() * scale.float()


def _nvfp4(q: Tensor, blocks: Tensor, whole: Tensor) -> Tensor:
    """[N, K / 2] bytes -> [N, K]."""
    codes = torch.stack([q & 15, q >> 4], dim=-1).flatten(1)
    scaled = torch.unflatten(torch.tensor(E2M1)[codes.int()], 1, (-1, 16)) * blocks.float()[..., None]
    return scaled.flatten(1) * whole.float()


def _divided(x: Tensor, scales: Tensor) -> Tensor:
    return x / scales.float()
