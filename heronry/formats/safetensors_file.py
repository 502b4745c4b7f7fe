"""Single .safetensors files: read lazily, written one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..progress import ByteCounter
from .lazy_tensor import Tensors, as_lazy

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
CHUNK = 16 << 20  # bytes written at a time


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins like one: the length of the header in 8 bytes, then JSON."""
    return head[8:9] == b"{"


def read(path: Path) -> Tensors:
    """The tensors of a .safetensors file, mapped."""
    return as_lazy(read_mapped(path), mapped=True)


def read_mapped(path: Path) -> dict[str, Tensor]:
    """As `read`, also for tensors without elements."""
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise InputError(f"damaged or truncated safetensors file ({error})") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a .safetensors file; empty for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def write(tensors: Tensors, path: Path, counter: ByteCounter) -> None:
    """Writes a .safetensors file with one tensor in memory at a time.

    The format: the length of the header in 8 bytes, the header as JSON, the numbers.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, x in tensors.items():
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for x in tensors.values():
            write_numbers(file, x.read(), counter)


def write_numbers(file: BinaryIO, x: Tensor, counter: ByteCounter) -> None:
    """Writes the bytes of a tensor in chunks, so that a mapped tensor is never in memory as a whole."""
    flat = x.reshape(-1)
    step = max(1, CHUNK // x.dtype.itemsize)
    for begin in range(0, len(flat), step):
        chunk = flat[begin : begin + step].contiguous().view(torch.uint8)
        file.write(chunk.numpy().data)
        counter.add(len(chunk))
