"""Matrices of other programs' codes and scales as heronry's int8, without loss: see checkpoint/packed_layout.py.

Ours has a code in -128 .. 127 for each weight and a float16 scale for each 32 weights of a row. So it holds every
format with whole codes of at most 8 bits whose scales are float16 and shared by a multiple of 32 weights.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from .lazy_tensor import LazyTensor, Tensors

GROUP = 32
MATRICES = re.compile(r"(blocks\.\d+\.(att\.(receptance|key|value|output)|ffn\.(key|value))|head)\.weight")


def add_matrix(tensors: Tensors, name: str, q: LazyTensor, scales: LazyTensor, group: int) -> None:
    """Adds a matrix [out, in], packed where heronry packs this one, else as float32.

    Args:
        q: the codes, int8 [out, in].
        scales: float16 [out, in / group], the last group of a row may be short.
        group: weights that share a scale.

    Raises:
        InputError: the codes and the scales do not fit.
    """
    rows, columns = q.shape if len(q.shape) == 2 else (0, 0)
    if scales.numel() != rows * -(-columns // group) or scales.dtype != torch.float16:
        found = f"{str(scales.dtype).removeprefix('torch.')} {list(scales.shape)}"
        raise InputError(f"{name} {list(q.shape)} has scales that do not fit it, {found}")
    scales = scales.map(partial(torch.reshape, shape=(rows, -1)))
    whole_groups = columns % GROUP == 0 and (group % GROUP == 0 or group == columns)
    if MATRICES.fullmatch(name) and whole_groups:
        tensors[name] = q
        tensors[f"{name.removesuffix('weight')}scales"] = scales.map(partial(_spread, group // GROUP, columns // GROUP))
    else:
        tensors[name] = LazyTensor.deferred(q.shape, torch.float32, partial(_multiply, group), q, scales)


def holds_packed(tensors: Tensors) -> bool:
    """Whether `add_matrix` has packed any of them."""
    return any(name.endswith(".scales") for name in tensors)


def per_column(x: Tensor, group: int, columns: int) -> Tensor:
    """Numbers of groups, [out, groups], for each column: [out, columns]; ValueError if there are not so many groups."""
    if x.shape[1] != -(-columns // group):
        raise ValueError(f"{x.shape[1]} groups of {group} for {columns} columns")
    if x.shape[1] == 1:
        return x.expand(-1, columns)
    return x.repeat_interleave(group, dim=1)[:, :columns]


def _spread(times: int, groups: int, scales: Tensor) -> Tensor:
    return per_column(scales, times, groups)


def _multiply(group: int, q: Tensor, scales: Tensor) -> Tensor:
    return q.float() * per_column(scales.float(), group, q.shape[1])
