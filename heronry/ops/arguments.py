"""Passes tensors to compiled functions, which do not know PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # the order of Dtype in simd.h


def array(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    """The fields of an Array of simd.h for x [B, T, H, N] or [B, T, A], whose last axis must be dense."""
    strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2] if x.ndim == 4 else 0, DTYPES.index(x.dtype)


def call(function: Any, tensors: Iterable[torch.Tensor], cu: Sequence[int] | None, *numbers: int) -> None:
    """Calls function(Arrays of the tensors, boundaries of packed sequences or null, numbers ..., threads)."""
    dense = [(x if x.stride(-1) == 1 else x.contiguous()).resolve_neg() for x in tensors]
    arrays = [number for x in dense for number in array(x)]
    function(
        (ctypes.c_int64 * len(arrays))(*arrays),
        None if cu is None else (ctypes.c_int64 * len(cu))(*cu),
        *map(ctypes.c_int64, (*numbers, torch.get_num_threads())),
    )
