"""ggml's quantized types, which GGUF and rwkv.cpp files share, through llama.cpp's own package gguf."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

UNQUANTIZED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def import_gguf() -> Any:
    """The package gguf, which is optional (extra `convert`)."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise InputError("GGUF files need the package gguf: pip install 'heronry[convert]'") from error


def block_bytes(type_name: str) -> int:
    """The size in bytes of a block of 32 weights."""
    gguf = import_gguf()
    size: int = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][1]
    return size


def dequantize(data: NDArray[Any], type_name: str) -> Tensor:
    """The bytes of a tensor, flat or [..., bytes of a row] -> its numbers as float32.

    Raises:
        NotImplementedError: a type that the package gguf cannot dequantize.
    """
    gguf = import_gguf()
    quantization = gguf.GGMLQuantizationType[type_name]
    if data.ndim == 1:
        data = data.reshape(-1, gguf.GGML_QUANT_SIZES[quantization][1])
    return torch.from_numpy(gguf.quants.dequantize(data, quantization))


def quantize(x: Tensor, type_name: str) -> NDArray[Any]:
    """The bytes of a tensor in one of ggml's types."""
    dtype = UNQUANTIZED.get(type_name)
    if dtype is not None:
        return x.to(dtype).contiguous().view(torch.uint8).numpy()
    gguf = import_gguf()
    data: NDArray[Any] = gguf.quants.quantize(x.float().contiguous().numpy(), gguf.GGMLQuantizationType[type_name])
    return data
