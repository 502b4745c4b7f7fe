"""rwkv.cpp's .bin files: a header of six integers, then tensor after tensor.

Read are versions 100 and 101 in FP32, FP16, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0; written is 101 in FP32 or FP16. The
numbers are BlinkDL's but for the decay, which lies exponentiated (RWKV-4: -e^w, 5: e^-e^w), the bonus of RWKV-5.0
likewise, what one multiplies by from the right, which lies transposed, and the six mixes of RWKV-7, which lie together.
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
from .lazy_tensor import LazyTensor, Progress, Tensors, nth, squeezed, transposed, write_numbers

MAGIC = 0x67676D66
NUMBERS = {0: torch.float32, 1: torch.float16}
QUANTIZED = {2: "Q4_0", 3: "Q4_1", 7: "Q5_0", 8: "Q5_1", 9: "Q8_0"}  # as ggml has them, in blocks of 32
HEADER, TENSOR = struct.Struct("<6i"), struct.Struct("<3i")
MIXES = [f"att.x_{name}" for name in "rwkvag"]
TRANSPOSED = (
    *("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    *(f"att.{name}{i}" for name in "wavg" for i in (1, 2)),
)


def is_ggml(head: bytes) -> bool:
    return head[:4] == MAGIC.to_bytes(4, "little")


def read(path: Path) -> Tensors:
    """The tensors under BlinkDL's names; quantized ones in float32."""
    size = path.stat().st_size
    found: Tensors = {}
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise InputError("damaged or truncated rwkv.cpp file (it ends inside its header)")
        _, version, vocab, width, layers, _ = HEADER.unpack(head)
        if version not in (100, 101):
            raise InputError(f"rwkv.cpp file of version {version}; 100 and 101 are known")
        while (at := file.tell()) < size:
            try:
                dimensions, length, kind = TENSOR.unpack(file.read(TENSOR.size))
                if not 1 <= dimensions <= 4 or not 0 < length < 1000:
                    raise InputError(f"damaged rwkv.cpp file (no tensor begins at byte {at})")
                shape = struct.unpack(f"<{dimensions}i", file.read(4 * dimensions))[::-1]
                name = file.read(length).decode()
            except (struct.error, UnicodeDecodeError) as error:
                raise InputError(f"damaged or truncated rwkv.cpp file (at byte {at})") from error
            found[name], end = _tensor(path, name, kind, torch.Size(shape), file.tell())
            if end > size:
                raise InputError(f"truncated rwkv.cpp file: {name} goes on after its end")
            file.seek(end)
    emb = found.get("emb.weight")
    told, shown = (vocab, width, layers), tuple(emb.shape) if emb else ()
    blocks = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if told != (*shown, blocks):
        raise InputError(f"its header says {told} tokens, channels and layers, its tensors say {(*shown, blocks)}")
    return _to_blinkdl(found)


def _tensor(path: Path, name: str, kind: int, shape: torch.Size, begin: int) -> tuple[LazyTensor, int]:
    """The tensor whose numbers begin there, and where they end."""
    if min(shape) < 1:
        raise InputError(f"{name} has the shape {list(shape)}")
    if kind in NUMBERS:
        dtype = NUMBERS[kind]
        size = shape.numel() * dtype.itemsize

        def read() -> Tensor:
            return torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (size,))).view(dtype).view(shape)

        return LazyTensor(shape, dtype, read), begin + size
    if kind not in QUANTIZED or shape[-1] % 32:
        raise InputError(f"{name} is of ggml's type {kind}, {list(shape)}, which is not read")
    from .gguf import block_bytes, dequantize

    size = shape.numel() // 32 * block_bytes(QUANTIZED[kind])

    def unpacked() -> Tensor:
        return dequantize(np.memmap(path, np.uint8, "r", begin, (size,)), QUANTIZED[kind]).view(shape)

    return LazyTensor(shape, torch.float32, unpacked), begin + size


def _to_blinkdl(tensors: Tensors) -> Tensors:
    fourth = "blocks.0.att.ln_x.weight" not in tensors
    fifth = not fourth and "blocks.0.att.time_mix_k" in tensors
    gated = "blocks.0.att.gate.weight" in tensors
    made: Tensors = {}
    for name, x in tensors.items():
        if name.endswith("att.x_rwkvag"):
            for i, mix in enumerate(MIXES):
                made[name.replace("att.x_rwkvag", mix)] = x.map(partial(nth, i, 6))
            continue
        if name.endswith(TRANSPOSED):
            x = x.map(transposed)
        elif name.endswith("att.time_decay") and fourth:
            x = x.map(lambda x: _inverse(x, lambda w: -w.exp(), lambda y: (-y).log()))
        elif name.endswith("att.time_decay") and fifth:
            x = x.map(_flat).map(lambda x: _inverse(x, lambda w: (-w.exp()).exp(), lambda y: (-y.log()).log()))
        elif name.endswith("att.time_decay"):
            x = x.map(lambda x: x.reshape(1, 1, -1))
        elif name.endswith("att.time_first") and fifth and not gated:
            x = x.map(_flat).map(lambda x: _inverse(x, Tensor.exp, Tensor.log))
        elif name.endswith("att.time_faaaa"):
            x = x.map(_flat)
        made[name] = x
    return made


def _inverse(y: Tensor, of: Callable[[Tensor], Tensor], by: Callable[[Tensor], Tensor]) -> Tensor:
    """float32 numbers w with of(w) = y: what 16 bits can hold, where that gives y, for most were made of such."""
    exact = by(y.double())
    w = exact.float()
    for dtype in (torch.float16, torch.bfloat16):
        short = exact.to(dtype).float()
        w = torch.where(of(short) == y, short, w)
    return w


def write(tensors: Tensors, path: Path, dtype: torch.dtype, progress: Progress) -> None:
    """An rwkv.cpp file of tensors under BlinkDL's names: matrices in `dtype`, float32 or float16, the rest float32."""
    if "blocks.0.att.time_state" in tensors:
        raise InputError("rwkv.cpp's files have no place for a tuned initial state")
    if "blocks.0.att.ln_x.weight" in tensors and "blocks.0.att.time_decay" in tensors:
        gated, shape = "blocks.0.att.gate.weight" in tensors, tensors["blocks.0.att.time_decay"].shape
        if "blocks.0.att.time_maa_x" not in tensors and gated and shape[1:].numel() == 1:
            raise InputError("rwkv.cpp takes an RWKV-5.1 for a 5.2 and computes something else")
    kind = next((kind for kind, known in NUMBERS.items() if known == dtype), None)
    if kind is None:
        raise InputError(f"rwkv.cpp's files are written in float32 or float16, not {dtype}")
    vocab, width = tensors["emb.weight"].shape
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 101, vocab, width, layers, kind))
        for name, x in _from_blinkdl(tensors).items():
            wide = len(x.shape) == 1 or ".time_" in name or dtype == torch.float32
            x = x.to(torch.float32 if wide else dtype)
            file.write(TENSOR.pack(len(x.shape), len(name.encode()), 0 if wide else 1))
            file.write(struct.pack(f"<{len(x.shape)}i", *x.shape[::-1]) + name.encode())
            write_numbers(file, x.read(), progress)


def _from_blinkdl(tensors: Tensors) -> Tensors:
    fourth = "blocks.0.att.ln_x.weight" not in tensors
    fifth = not fourth and "blocks.0.att.time_mix_k" in tensors
    made: Tensors = {}
    for name, x in tensors.items():
        prefix, _, part = name.partition(".att.")
        if f"att.{part}" in MIXES:
            if part == "x_r":
                parts = [tensors[f"{prefix}.{mix}"] for mix in MIXES]
                made[f"{prefix}.att.x_rwkvag"] = LazyTensor.made(_together, *parts)
            continue
        if ".time_" in name or name.endswith(("w0", "a0", "v0", "k_k", "k_a", "ffn.x_k")):
            x = x.map(squeezed)
        if name.endswith(TRANSPOSED):
            x = x.map(transposed)
        elif name.endswith("att.time_decay") and fourth:
            x = x.map(lambda x: -x.float().exp())
        elif name.endswith("att.time_decay") and fifth:
            x = x.map(lambda x: _column((-x.float().exp()).exp()))
        elif name.endswith("att.time_decay"):
            heads = tensors["blocks.0.att.time_faaaa"].shape[0]
            x = x.map(partial(_per_head, heads))
        elif name.endswith("att.time_first") and fifth:
            x = x.map(lambda x: _column(x.float().exp()))
        elif name.endswith("att.time_faaaa"):
            x = x.map(_column)
        made[name] = x
    return made


def _column(x: Tensor) -> Tensor:
    """[H] -> [H, 1, 1], [H, N] -> [H, N, 1]."""
    return x[..., None] if x.ndim == 2 else x.reshape(-1, 1, 1)


def _flat(x: Tensor) -> Tensor:
    """[H, 1, 1] -> [H], [H, N, 1] -> [H, N]."""
    return x.flatten(1).squeeze(1)


def _per_head(heads: int, x: Tensor) -> Tensor:
    return x.reshape(heads, -1, 1)


def _together(*vectors: Tensor) -> Tensor:
    return torch.stack([x.reshape(1, -1) for x in vectors])
