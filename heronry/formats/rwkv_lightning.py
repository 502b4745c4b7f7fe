"""rwkv_lightning's quantized .rwkvq files: RWKV-7 with int8 or int4 matrices, as heronry's int8 without loss.

- a header of two numbers, then one tensor after another: name, kind, shape, numbers, scales; nothing is aligned
- int8 has a scale a row; int4 has one for each 32 or 128 columns, and two columns in a byte, the even one low
- names and shapes are those of the .pth
"""

from __future__ import annotations

import math
import struct
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import packed_int8
from .lazy_tensor import LazyTensor, Tensors

MAGIC = b"RWKVQ\0\1\0"
FLOATS = {0: torch.bfloat16, 1: torch.float16}
INT8, INT4 = 2, 3
MOST_AXES, LONGEST_NAME = 16, 1000
HEADER, TENSOR = struct.Struct("<II"), struct.Struct("<IBBHQ")


def is_rwkvq(head: bytes) -> bool:
    """Whether a file begins like those of rwkv_lightning."""
    return head.startswith(MAGIC)


def read(path: Path) -> Tensors:
    """The tensors under BlinkDL's names, matrices packed as heronry's int8 (see packed_int8.py)."""
    size = path.stat().st_size
    tensors: Tensors = {}
    with open(path, "rb") as file:
        file.seek(len(MAGIC))
        try:
            version, count = HEADER.unpack(file.read(HEADER.size))
            if version != 1:
                raise InputError(f"rwkv_lightning's .rwkvq of version {version}; supported is 1")
            for _ in range(count):
                _read_tensor(path, file, size, tensors)
        except (struct.error, UnicodeDecodeError) as error:
            raise InputError(f"damaged or truncated .rwkvq file (at byte {file.tell()})") from error
        if file.tell() != size:
            raise InputError(f"damaged .rwkvq file: {size - file.tell()} bytes follow its last tensor")
    return tensors


def _read_tensor(path: Path, file: BinaryIO, size: int, tensors: Tensors) -> None:
    """Adds the tensor at the position of the file, which it moves to the next one."""
    begin = file.tell()
    length, kind, axes, group, count = TENSOR.unpack(file.read(TENSOR.size))
    if not 0 < length <= LONGEST_NAME or axes > MOST_AXES or kind not in (*FLOATS, INT8, INT4):
        raise InputError(f"damaged .rwkvq file (no tensor begins at byte {begin})")
    name = file.read(length).decode()
    shape = struct.unpack(f"<{axes}q", file.read(8 * axes))
    if min(shape, default=1) < 1 or math.prod(shape) != count or name in tensors:
        raise InputError(f"damaged .rwkvq file: {name!r} has the shape {list(shape)} and {count} numbers, or is twice")

    def take(numbers: int, dtype: torch.dtype, *shape: int) -> LazyTensor:
        """The numbers at the position of the file, which moves behind them."""
        begin, n_bytes = file.tell(), numbers * dtype.itemsize
        if begin + n_bytes > size:
            raise InputError(f"truncated .rwkvq file: {name} is incomplete")
        file.seek(begin + n_bytes)
        return LazyTensor(torch.Size(shape), dtype, partial(_map, path, begin, n_bytes, dtype, shape))

    if kind in FLOATS:
        tensors[name] = take(count, FLOATS[kind], *shape)
        return
    if axes != 2 or (kind == INT4 and (group < 1 or group % packed_int8.GROUP)):
        raise InputError(f"{name} is quantized with the shape {list(shape)} and groups of {group}: not supported")
    rows, columns = shape
    if kind == INT8:
        group, q = columns, take(count, torch.int8, rows, columns)
    else:
        half = -(-columns // 2)
        packed = take(rows * half, torch.uint8, rows, half)
        q = LazyTensor.deferred(shape, torch.int8, partial(_unpack, columns), packed)
    (n_scales,) = struct.unpack("<Q", file.read(8))
    packed_int8.add_matrix(tensors, name, q, take(n_scales, torch.float16, n_scales), group)


def _map(path: Path, begin: int, n_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (n_bytes,))).view(dtype).view(shape)


def _unpack(columns: int, q: Tensor) -> Tensor:
    """Two codes of 4 bits in two's complement in a byte, the lower half first: [out, in / 2] -> int8 [out, in]."""
    halves = q.view(torch.int8)
    codes = torch.empty(*q.shape, 2, dtype=torch.int8)
    torch.bitwise_right_shift(halves << 4, 4, out=codes[..., 0])
    torch.bitwise_right_shift(halves, 4, out=codes[..., 1])
    return codes.flatten(1)[:, :columns]
