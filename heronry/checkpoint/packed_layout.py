"""Quantized matrices in a file.

Under the name of a matrix: int8 [out, in], or for int4 uint8 [out, in / 2] (of each 8 columns, code i is in the low and
code i + 4 in the high half of byte i). Beside it, as `.scales`: float16 [out, in / 32]. ops/packed says what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, show
from ..formats.lazy_tensor import LazyTensor, Tensors
from ..models.layers import PackedLinear
from ..ops.packed import GROUP, untile
from ..quantization import FORMATS


def rows_and_scales(module: PackedLinear) -> tuple[Tensor, Tensor]:
    """The weights and scales of a packed matrix in the layout of a file."""
    q, scales = untile(module.weight.cpu(), module.scales.cpu(), module.out_features)
    return q.contiguous(), scales.contiguous()


def logical_shapes(tensors: Tensors, format: Any) -> dict[str, torch.Size]:
    """The shapes of all tensors of a file, quantized matrices with that of the matrix they represent, without scales.

    format: what the config says of the quantization; None = none.

    Raises:
        InputError: integers that are no quantized matrix, or quantized matrices that do not fit their scales.
    """
    for key, x in tensors.items():
        if not x.is_floating_point and not (format and f"{key.removesuffix('weight')}scales" in tensors):
            raise InputError(f"{key} is {x.dtype}, not a floating point tensor; use the original checkpoint")
    if format is None:
        return {key: x.shape for key, x in tensors.items()}
    if not isinstance(format, str) or format not in FORMATS:
        raise InputError(f"config.json says quantization = {show(format)}; supported are {', '.join(FORMATS)}")
    dtype, bytes_per_group = (torch.int8, GROUP) if format == "int8" else (torch.uint8, GROUP // 2)
    shapes = {key: x.shape for key, x in tensors.items() if not key.endswith(".scales")}
    for key in tensors.keys() - shapes.keys():
        weight = f"{key.removesuffix('scales')}weight"
        scales, q = tensors[key], tensors.get(weight)
        if (
            q is None
            or q.dtype != dtype
            or scales.dtype != torch.float16
            or len(q.shape) != 2
            or len(scales.shape) != 2
        ):
            raise InputError(f"{key} and its matrix are not in the layout of {format}")
        if tuple(q.shape) != (scales.shape[0], scales.shape[1] * bytes_per_group):
            raise InputError(f"{key} has the shape {list(scales.shape)}, which does not fit its matrix {list(q.shape)}")
        shapes[weight] = torch.Size((q.shape[0], scales.shape[1] * GROUP))
    return shapes


def pop_packed(tensors: Tensors, config: Mapping[str, Any]) -> dict[str, tuple[LazyTensor, LazyTensor]]:
    """Removes the quantized matrices from `tensors` and returns their weights and scales, by the matrix's name."""
    packed = {}
    for key in [key for key in tensors if config.get("quantization") and key.endswith(".scales")]:
        weight = f"{key.removesuffix('scales')}weight"
        packed[weight] = (tensors.pop(weight), tensors.pop(key))
    return packed
