"""Matrices of 8-bit or 4-bit weights, and products with them.

A row is cut into groups of 32 weights with one float16 scale each. int8: a weight is q * scale with q in -127 .. 127.
int4: it is LEVELS[code] * scale with a code in 0 .. 15; the levels are spaced for normally distributed weights, and a
negative scale mirrors them.

The activations of a product are rounded to 8 bits too, with one scale for each group of a token, so that a group is
a sum of integers. Compared with the rounding of the weights that costs nothing (docs/quantization.md), and it is what
makes a product with many tokens fast.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...memory import Scratch
from ..arguments import DTYPES
from ..dispatch import check_devices, has_native_body, has_tangents, native_library

GROUP = 32
INT8, INT4 = 4, 5  # Format in matmul.h
TILE = 16  # output rows that are stored together
# From Lloyd's algorithm over groups of normally distributed weights, each with its best scale. One level is fixed at 0:
# where outliers set the scale, most weights are close to 0. The levels fit into 7 bits, as some kernels need
# (matmul.h), which costs no accuracy.
LEVELS = (-55, -45, -35, -27, -21, -15, -10, -5, 0, 5, 10, 16, 22, 29, 37, 47)
_scratch = Scratch()  # for the activations of a product
TABLE = (ctypes.c_uint8 * 16)(*(level + 64 for level in LEVELS))


def pack(codes: Tensor) -> Tensor:
    """Packs codes below 16, uint8 [out, in], two into a byte, [out, in / 2]: of every 8, code i with code i + 4."""
    low, high = torch.unflatten(codes, 1, (-1, 2, 4)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack(q: Tensor) -> Tensor:
    """The inverse of `pack`: bytes [out, in / 2] -> codes [out, in]."""
    fours = q.unflatten(1, (-1, 4))
    return torch.stack([fours & 15, fours >> 4], dim=2).flatten(1)


def tile(q: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Brings q, int8 [out, in] or packed codes uint8 [out, in / 2], and scales [out, in / 32] into the kernel's layout:
    bytes [tiles, in / 4 or in / 8, 16, 4], scales [tiles, in / 32, 16]. The last tile is padded with rows of zeros."""
    more = -len(q) % TILE
    # moves 4 bytes as one number: 7 times as fast in PyTorch
    quads = F.pad(q, (0, 0, 0, more)).view(torch.int32).unflatten(0, (-1, TILE)).transpose(1, 2)
    data = quads.contiguous().view(torch.uint8)
    if q.dtype == torch.int8:
        data ^= 128  # -128 .. 127 becomes 0 .. 255
    scales = F.pad(scales, (0, 0, 0, more)).unflatten(0, (-1, TILE)).transpose(1, 2)
    return data.unflatten(2, (TILE, 4)), scales.contiguous()


def untile(data: Tensor, scales: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The inverse of `tile`, for a matrix of `rows` output rows."""
    if not is_int4(data, scales):
        data = (data - 128).view(torch.int8)
    return data.transpose(1, 2).flatten(0, 1).flatten(1)[:rows], scales.transpose(1, 2).flatten(0, 1)[:rows]


def is_int4(data: Tensor, scales: Tensor) -> bool:
    """Whether a tiled matrix is int4, not int8."""
    return data.shape[1] * 4 != scales.shape[1] * GROUP


def dequantize(q: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights [out, in] of q and scales as `tile` takes them."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=q.device)
    values = levels[unpack(q).int()] if q.dtype == torch.uint8 else q.float()
    return (torch.unflatten(values, 1, (-1, GROUP)) * scales.float()[..., None]).flatten(1)


def packed_matmul(x: Tensor, data: Tensor, scales: Tensor, rows: int) -> Tensor:
    """x [..., in] times the transpose of a tiled matrix [rows, in]: [..., rows] in x's dtype.

    Differentiable in x. In C++ where that compiles, for activations of float32, bfloat16 and float16 on a CPU.

    Raises:
        ValueError: a shape or dtype does not fit, the tensors are not all on one device, or forward-mode
            differentiation goes through x; the message names it.
        MemoryError: there is no memory for the rounded activations.
    """
    check_devices("packed_matmul", x, data, scales)
    _check_tiles(data, scales, rows)
    columns = scales.shape[1] * GROUP
    if x.shape[-1] != columns:
        raise ValueError(f"packed_matmul: x must have {columns} numbers in its last dimension, got {list(x.shape)}")
    if not torch.compiler.is_compiling() and has_tangents((x,)):
        raise ValueError("packed_matmul has no forward-mode derivative")
    y: Tensor = _packed_matmul(x.reshape(-1, columns), data, scales, rows)
    return y.view(*x.shape[:-1], rows)


def _check_tiles(data: Tensor, scales: Tensor, rows: int) -> None:
    """ValueError unless data and scales are a tiled matrix of `rows` output rows: C++ would read beyond its end."""
    tiles = -(-rows // TILE)
    groups = scales.shape[1] if scales.ndim == 3 else 0
    shapes = [(tiles, groups * GROUP // per_word, TILE, 4) for per_word in (4, 8)]
    fits = rows > 0 and scales.shape == (tiles, groups, TILE) and data.shape in shapes
    if not fits or data.dtype != torch.uint8 or scales.dtype != torch.float16:
        found = " and ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (data, scales))
        raise ValueError(f"packed_matmul: {found} are not a tiled matrix of {rows} rows")


@torch.library.custom_op("heronry::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, data: Tensor, scales: Tensor, rows: int) -> Tensor:
    """x [M, in] -> [M, rows]."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or not has_native_body("packed"):
        return reference(x, data, scales, rows)
    x, data, scales = x.contiguous(), data.contiguous(), scales.contiguous()
    y = torch.empty(len(x), rows, dtype=torch.float32, device="cpu")
    matrix = (ctypes.c_int64 * 6)(*describe(data, scales, rows))
    dtype, count, threads = map(ctypes.c_int64, (DTYPES.index(x.dtype), len(x), torch.get_num_threads()))
    x_at, y_at = map(ctypes.c_void_p, (x.data_ptr(), y.data_ptr()))
    matmul = partial(native_library("packed").packed_matmul, matrix, x_at, dtype, y_at, count, threads)
    matmul(None, ctypes.byref(size := ctypes.c_int64()))  # without memory it only writes the size of what it needs
    buffer = _scratch.take(size.value)
    matmul(ctypes.c_void_p(buffer.data_ptr()), ctypes.byref(size))
    _scratch.give_back(buffer)
    return y.to(x.dtype)


@_packed_matmul.register_fake
def _(x: Tensor, data: Tensor, scales: Tensor, rows: int) -> Tensor:
    return x.new_empty(len(x), rows)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, data, scales, ctx.rows = inputs
    ctx.save_for_backward(data, scales)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """The gradient of x, which ignores that x is rounded."""
    data, scales = ctx.saved_tensors
    weights = dequantize(*untile(data, scales, ctx.rows))
    return gradient @ weights.to(gradient.dtype), None, None, None


_packed_matmul.register_autograd(_gradient, setup_context=_remember)


def reference(x: Tensor, data: Tensor, scales: Tensor, rows: int) -> Tensor:
    """`_packed_matmul` in PyTorch, on any device: the weights are unpacked for every product."""
    groups = x.float().unflatten(1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    rounded = (groups * torch.where(top > 0, 127 / top, 0)).round() * (top / 127)
    return F.linear(rounded.flatten(1), dequantize(*untile(data, scales, rows))).to(x.dtype)


def describe(data: Tensor, scales: Tensor, rows: int) -> tuple[int, ...]:
    """The fields of matmul.h's Tensor for a tiled matrix."""
    dtype = INT4 if is_int4(data, scales) else INT8
    return data.data_ptr(), scales.data_ptr(), dtype, rows, scales.shape[1] * GROUP, ctypes.addressof(TABLE)
