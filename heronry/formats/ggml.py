"""rwkv.cpp's .bin files: a header of six integers, then one tensor after another.

- reads versions 100 and 101 in FP32, FP16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0; writes 101 in FP32 or FP16
- the decay is stored exponentiated (RWKV-4: -e^w, 5: e^-e^w), as is the bonus of RWKV-5.0
- matrices W of products x W (the low-rank ones) are transposed
- the six token-shift mixes of RWKV-7 are one tensor

Source: FILE_FORMAT.md and convert_pytorch_to_ggml.py of rwkv.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..progress import ByteCounter
from .ggml_types import block_bytes, dequantize
from .lazy_tensor import LazyTensor, Tensors, nth, squeezed, transposed
from .safetensors_file import write_numbers

MAGIC = 0x67676D66
NUMBERS = {0: torch.float32, 1: torch.float16}
QUANTIZED = {2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}  # in blocks of 32 weights
HEADER, TENSOR = struct.Struct("<6i"), struct.Struct("<3i")
MIXES = [f"att.x_{name}" for name in "rwkvag"]
FLOAT32 = ("att.x_rwkvag", "att.r_k")  # multiplied elementwise, which rwkv.cpp does in float32 only
TRANSPOSED = (
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    *(f"att.{name}{i}" for name in "wavg" for i in (1, 2)),
)


def is_ggml(head: bytes) -> bool:
    """Whether a file begins like those of rwkv.cpp."""
    return head[:4] == MAGIC.to_bytes(4, "little")


def read(path: Path) -> Tensors:
    """The tensors under BlinkDL's names; quantized ones in float32."""
    size = path.stat().st_size
    tensors: Tensors = {}
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise InputError("damaged or truncated rwkv.cpp file (it ends within its header)")
        _, version, vocab, width, layers, _ = HEADER.unpack(head)
        if version not in (100, 101):
            raise InputError(f"rwkv.cpp file of version {version}; supported are 100 and 101")
        while (offset := file.tell()) < size:
            try:
                dimensions, length, kind = TENSOR.unpack(file.read(TENSOR.size))
                if not 1 <= dimensions <= 4 or not 0 < length < 1000:
                    raise InputError(f"damaged rwkv.cpp file (no tensor begins at byte {offset})")
                shape = struct.unpack(f"<{dimensions}i", file.read(4 * dimensions))[::-1]
                name = file.read(length).decode()
            except (struct.error, UnicodeDecodeError) as error:
                raise InputError(f"damaged or truncated rwkv.cpp file (at byte {offset})") from error
            if name in tensors:
                raise InputError(f"damaged rwkv.cpp file ({name} occurs twice)")
            tensors[name], end = _read_tensor(path, name, kind, torch.Size(shape), file.tell())
            if end > size:
                raise InputError(f"truncated rwkv.cpp file: {name} is incomplete")
            file.seek(end)
    emb = tensors.get("emb.weight")
    n_blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    in_header, in_tensors = (vocab, width, layers), (*(emb.shape if emb else ()), n_blocks)
    if in_header != in_tensors:
        raise InputError(f"its header says {in_header} tokens, channels and layers, its tensors say {in_tensors}")
    return _to_blinkdl(tensors)


def _read_tensor(path: Path, name: str, kind: int, shape: torch.Size, begin: int) -> tuple[LazyTensor, int]:
    """The tensor whose numbers begin at byte `begin`, and the offset of the byte after them."""
    if min(shape) < 1:
        raise InputError(f"{name} has the shape {list(shape)}")
    if kind in NUMBERS:
        dtype = NUMBERS[kind]
        size = shape.numel() * dtype.itemsize

        def read() -> Tensor:
            return torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (size,))).view(dtype).view(shape)

        return LazyTensor(shape, dtype, read), begin + size
    if kind not in QUANTIZED or shape[-1] % 32:
        raise InputError(f"{name} has ggml's type {kind} and the shape {list(shape)}, which is not supported")
    size = shape.numel() // 32 * block_bytes(QUANTIZED[kind])

    def read_quantized() -> Tensor:
        return dequantize(np.memmap(path, np.uint8, "r", begin, (size,)), QUANTIZED[kind]).view(shape)

    return LazyTensor(shape, torch.float32, read_quantized, QUANTIZED[kind].lower()), begin + size


def _to_blinkdl(tensors: Tensors) -> Tensors:
    is_v4 = "blocks.0.att.ln_x.weight" not in tensors
    is_v5 = not is_v4 and "blocks.0.att.time_mix_k" in tensors
    has_gate = "blocks.0.att.gate.weight" in tensors
    renamed: Tensors = {}
    for name, x in tensors.items():
        if name.endswith("att.x_rwkvag"):
            for i, mix in enumerate(MIXES):
                renamed[name.replace("att.x_rwkvag", mix)] = x.map(partial(nth, i, 6))
            continue
        if name.endswith(TRANSPOSED):
            x = x.map(transposed)
        elif name.endswith("att.time_decay") and is_v4:
            x = _inverted(x, lambda w: -w.exp(), lambda y: (-y).log())
        elif name.endswith("att.time_decay") and is_v5:
            x = _inverted(x.map(_flat), lambda w: (-w.exp()).exp(), lambda y: (-y.log()).log())
        elif name.endswith("att.time_decay"):
            x = x.map(lambda x: x.reshape(1, 1, -1))
        elif name.endswith("att.time_first") and is_v5 and not has_gate:
            x = _inverted(x.map(_flat), Tensor.exp, Tensor.log)
        elif name.endswith("att.time_faaaa"):
            x = x.map(_flat)
        renamed[name] = x
    return renamed


def _inverted(y: LazyTensor, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> LazyTensor:
    """`_invert`, when it is read."""
    return LazyTensor.deferred(y.shape, torch.float32, lambda y: _invert(y, function, inverse), y)


def _invert(y: Tensor, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """float32 w with function(w) = y. Where a 16-bit w gives exactly y, it is preferred: most files were converted from
    16-bit weights."""
    exact = inverse(y.double())
    w = exact.float()
    for dtype in (torch.float16, torch.bfloat16):
        rounded = exact.to(dtype).float()
        w = torch.where(function(rounded) == y, rounded, w)
    return w


def write(tensors: Tensors, path: Path, dtype: torch.dtype, counter: ByteCounter) -> None:
    """Writes an rwkv.cpp file of tensors under BlinkDL's names: the matrices of products in `dtype` (float32 or
    float16), the rest in float32.
    """
    kind = next(kind for kind, known in NUMBERS.items() if known == dtype)
    vocab, width = tensors["emb.weight"].shape
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 101, vocab, width, layers, kind))
        for name, x in _from_blinkdl(tensors).items():
            is_float32 = len(x.shape) == 1 or ".time_" in name or name.endswith(FLOAT32) or dtype == torch.float32
            x = x.to(torch.float32 if is_float32 else dtype)
            file.write(TENSOR.pack(len(x.shape), len(name.encode()), 0 if is_float32 else 1))
            file.write(struct.pack(f"<{len(x.shape)}i", *x.shape[::-1]) + name.encode())
            write_numbers(file, x.read(), counter)


def check_supported(tensors: Tensors, dtype: str) -> None:
    """InputError unless rwkv.cpp supports this model, with matrices in this dtype.

    tensors: under BlinkDL's names.
    """
    if "blocks.0.att.time_state" in tensors:
        raise InputError("rwkv.cpp's format has no tuned initial state")
    if "blocks.0.att.ln_x.weight" in tensors and "blocks.0.att.time_decay" in tensors:
        has_gate, shape = "blocks.0.att.gate.weight" in tensors, tensors["blocks.0.att.time_decay"].shape
        if "blocks.0.att.time_maa_x" not in tensors and has_gate and shape[1:].numel() == 1:
            raise InputError("rwkv.cpp does not support RWKV-5.1: it would read it as a 5.2")
    if dtype not in ("float32", "float16"):
        raise InputError(f"rwkv.cpp's files are float32 or float16, not {dtype}; give one of them (--dtype)")


def _from_blinkdl(tensors: Tensors) -> Tensors:
    is_v4 = "blocks.0.att.ln_x.weight" not in tensors
    is_v5 = not is_v4 and "blocks.0.att.time_mix_k" in tensors
    per_head = tensors.get("blocks.0.att.time_faaaa") or tensors.get("blocks.0.att.time_first")
    heads = per_head.shape[0] if per_head else 0
    renamed: Tensors = {}
    for name, x in tensors.items():
        prefix, _, part = name.partition(".att.")
        if f"att.{part}" in MIXES:
            if part == "x_r":
                parts = [tensors[f"{prefix}.{mix}"] for mix in MIXES]
                shape = (len(parts), 1, x.numel())
                renamed[f"{prefix}.att.x_rwkvag"] = LazyTensor.deferred(shape, x.dtype, _stack, *parts)
            continue
        if ".time_" in name or name.endswith(("w0", "a0", "v0", "k_k", "k_a", "ffn.x_k")):
            x = x.map(squeezed)
        if name.endswith(TRANSPOSED):
            x = x.map(transposed)
        elif name.endswith("att.time_decay") and is_v4:
            x = LazyTensor.deferred(x.shape, torch.float32, lambda x: -x.float().exp(), x)
        elif name.endswith("att.time_decay") and is_v5:
            x = LazyTensor.deferred(x.shape, torch.float32, lambda x: (-x.float().exp()).exp(), x)
            x = x.map(partial(_per_head, heads))
        elif name.endswith(("att.time_decay", "att.time_faaaa")):
            x = x.map(partial(_per_head, heads))
        elif name.endswith("att.time_first") and is_v5:
            x = LazyTensor.deferred(x.shape, torch.float32, lambda x: x.float().exp(), x)
            x = x.map(partial(_per_head, heads))
        renamed[name] = x
    return renamed


def _flat(x: Tensor) -> Tensor:
    """[H, 1, 1] -> [H], [H, N, 1] -> [H, N]."""
    return x.flatten(1).squeeze(1)


def _per_head(heads: int, x: Tensor) -> Tensor:
    """[H] -> [H, 1, 1], [H, N] or [C] -> [H, N, 1]."""
    return x.reshape(heads, -1, 1)


def _stack(*vectors: Tensor) -> Tensor:
    """n vectors [..., C] -> [n, 1, C]."""
    return torch.stack([x.reshape(1, -1) for x in vectors])
