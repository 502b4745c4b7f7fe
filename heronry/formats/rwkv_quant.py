"""rwkv-quant's .rwkvq files: safetensors whose metadata say how each tensor is quantized. All become float32 when they
are read, except for dense ones.

A tensor K is made of parts K::FIELD. Its kind is one of

- dense: bfloat16
- rtn: a code and a float16 scale a row; single weights ("outliers") replace theirs
- asym: a code of 8 bits, with scale and minimum a block
- sb6: a code of 4 to 6 bits, with scale and minimum a block of 32, both in 6 bits; 8 blocks share their factors
- sym: a code of 8 or 6 bits, with a scale a block of 16 in 8 bits; 16 blocks share its factor
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, show
from . import safetensors_file
from .lazy_tensor import LazyTensor, Tensors
from .packed_int8 import per_column

KEY = "rwkvq"  # in the metadata
VERSION = 2
BLOCKS = {"sb6": 32, "sym": 16}  # columns that share a scale
SUPERBLOCK = 256  # columns that share its factor
CODES, INDICES = (torch.uint8, torch.int8), (torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SIZES = ("n_layer", "n_embd", "head_size", "vocab_size")


def read(path: Path, metadata: Mapping[str, str]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors under BlinkDL's names, and the sizes that the file says they have.

    metadata: of the file; KEY holds what is in it.

    Raises:
        InputError: a newer version, unknown kinds, parts that are missing or do not fit.
    """
    try:
        manifest = json.loads(metadata[KEY])
        version, naming, entries = manifest["format_version"], manifest["naming"], manifest["tensors"]
        kinds = {name: (entry["kind"], torch.Size(entry["shape"]), entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise InputError(f"its metadata {KEY!r} cannot be read ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise InputError(f"rwkv-quant's .rwkvq of version {show(version)}; supported is {VERSION}")
    if naming != "world":
        raise InputError(f"rwkv-quant's .rwkvq with the naming {show(naming)}; supported are BlinkDL's names (world)")
    parts: dict[str, dict[str, LazyTensor]] = {}
    for name, x in safetensors_file.read_mapped(path).items():
        key, _, field = name.partition("::")
        parts.setdefault(key, {})[field] = LazyTensor.from_tensor(x)
    if unknown := next((name for name in parts if name not in kinds), None):
        raise InputError(f"{unknown} is in the file, but not in its metadata {KEY!r}")
    tensors: Tensors = {}
    for name, (kind, shape, entry) in kinds.items():
        try:
            tensor = _dequantized(kind, shape, entry, parts.get(name, {}))
        except KeyError as error:
            raise InputError(f"{name} is not complete as {show(kind)} ({error} is missing)") from error
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{name} is not complete as {show(kind)} ({error})") from error
        if tensor.shape != shape:
            raise InputError(f"{name} has the shape {list(tensor.shape)}, but its metadata say {list(shape)}")
        tensors[name] = tensor
    sizes = {key: manifest[key] for key in SIZES if manifest.get(key) is not None}
    return tensors, {"model": "rwkv7", **sizes}


def _dequantized(kind: Any, shape: torch.Size, entry: Mapping[str, Any], parts: dict[str, LazyTensor]) -> LazyTensor:
    """The tensor that the parts represent."""
    if kind == "dense":
        return parts["dense"]
    if kind not in DECODERS or len(shape) != 2 or min(shape) < 1:
        raise InputError(f"this kind with the shape {list(shape)} is not supported")
    block = entry.get("gw_gs", BLOCKS.get(kind, 1))
    if type(block) is not int or block < 1 or (kind in BLOCKS and (block != BLOCKS[kind] or shape[1] % block)):
        raise InputError(f"blocks of {show(block)} columns, for {shape[1]} columns")
    expected = _expected_parts(kind, *shape, block, parts)
    for name, (part_shape, dtypes) in expected.items():
        part = parts[name]
        if part.shape != part_shape or part.dtype not in dtypes:
            found = f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"
            raise InputError(f"{name} is {found}, expected {list(part_shape)}")

    def compute(*tensors: Tensor) -> Tensor:
        x: Tensor = DECODERS[kind](dict(zip(expected, tensors, strict=True)), shape[1], block)
        return x

    return LazyTensor.deferred(shape, torch.float32, compute, *(parts[name] for name in expected))


def _expected_parts(
    kind: str, rows: int, columns: int, block: int, parts: Mapping[str, LazyTensor]
) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """The shapes and dtypes of the parts of a matrix [rows, columns]."""
    blocks, groups = -(-columns // block), -(-columns // SUPERBLOCK)
    packed: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "codes_packed": ((rows, -(-columns // 2)), CODES)
    }
    planes = dict.fromkeys(("gw_qh", "gw_qh2"), ((rows, columns // 8), CODES))
    plain = {"codes": ((rows, columns), CODES)}
    if kind == "rtn":
        outliers = parts["outlier_indices"].shape[0] if "outlier_indices" in parts else 0
        replaced = {"outlier_indices": ((outliers, 2), INDICES), "outlier_values": ((outliers,), FLOATS)}
        codes = plain if "codes" in parts else packed
        return codes | {"scale": ((rows, 1), FLOATS)} | (replaced if outliers else {})
    if kind == "asym":
        return plain | dict.fromkeys(("gw_scale", "gw_min"), ((rows, blocks), FLOATS))
    factor = ((rows, groups), FLOATS)
    if kind == "sb6":
        held = {name: plane for name, plane in planes.items() if name in parts}
        return packed | held | {"gw_qsqm": ((rows, groups, 12), CODES), "gw_d": factor, "gw_dm": factor}
    return (plain if "codes" in parts else packed | planes) | {"gw_qs": ((rows, blocks), CODES), "gw_d": factor}


def _rtn(parts: dict[str, Tensor], columns: int, block: int) -> Tensor:
    if "codes" in parts:
        codes = parts["codes"].float()
    else:  # the first half of a row is in the low half of the bytes
        packed = parts["codes_packed"]
        codes = torch.cat([packed & 15, packed >> 4], dim=1)[:, :columns].float() - 8
    x = codes * parts["scale"].float()
    if "outlier_indices" in parts:
        places, values = parts["outlier_indices"].long(), parts["outlier_values"].float()
        if not ((places >= 0) & (places < torch.tensor(x.shape))).all():
            raise InputError("outliers outside their matrix; the file is damaged")
        x[places[:, 0], places[:, 1]] = values
    return x


def _asym(parts: dict[str, Tensor], columns: int, block: int) -> Tensor:
    scale, low = (per_column(parts[name].float(), block, columns) for name in ("gw_scale", "gw_min"))
    x: Tensor = parts["codes"].float() * scale + low
    return x


def _sb6(parts: dict[str, Tensor], columns: int, block: int) -> Tensor:
    codes = _halves(parts["codes_packed"], 32)
    for i, name in enumerate(("gw_qh", "gw_qh2")):
        if name in parts:
            codes = codes + _bits(parts[name]) * (16 << i)
    scales, lows = (_six_bits(half) for half in parts["gw_qsqm"].split(6, dim=-1))  # [out, superblocks, 8]
    s = (scales.float() * parts["gw_d"].float()[..., None]).half().float().clamp_min(1e-8)
    m = ((lows - 31).float() * parts["gw_dm"].float()[..., None]).half().float()
    s, m = (x.flatten(1)[:, : columns // 32, None] for x in (s, m))
    x: Tensor = torch.unflatten(codes.float(), 1, (-1, 32)) * s + m
    return x.flatten(1)


def _sym(parts: dict[str, Tensor], columns: int, block: int) -> Tensor:
    if "codes" in parts:
        codes = parts["codes"]
    else:
        codes = _halves(parts["codes_packed"], 16) + _bits(parts["gw_qh"]) * 16 + _bits(parts["gw_qh2"]) * 32 - 32
    factors = per_column(parts["gw_d"].float(), 16, columns // 16)
    scales = (parts["gw_qs"].float() * factors).half().float()
    return (torch.unflatten(codes.float(), 1, (-1, 16)) * scales[..., None]).flatten(1)


def _halves(packed: Tensor, block: int) -> Tensor:
    """Codes of 4 bits: of each block, the first half of the columns is in the low half of the bytes. [out, in / 2] ->
    int32 [out, in]."""
    bytes_of = torch.unflatten(packed.int(), 1, (-1, block // 2))
    return torch.cat([bytes_of & 15, bytes_of >> 4], dim=2).flatten(1)


def _bits(plane: Tensor) -> Tensor:
    """A bit a column, the least of a byte first: [out, in / 8] -> int32 [out, in]."""
    return (plane.int()[..., None] >> torch.arange(8, device=plane.device) & 1).flatten(1)


def _six_bits(x: Tensor) -> Tensor:
    """Eight numbers of 6 bits in six bytes, the least bits first: [..., 6] -> int32 [..., 8]."""
    threes = torch.unflatten(x.int(), -1, (2, 3))  # [..., 2, 3]: four numbers in three bytes
    word = threes[..., 0] | threes[..., 1] << 8 | threes[..., 2] << 16
    return (word[..., None] >> torch.arange(0, 24, 6, device=x.device) & 63).flatten(-2)


DECODERS: dict[str, Callable[[dict[str, Tensor], int, int], Tensor]] = {
    "rtn": _rtn,
    "asym": _asym,
    "sb6": _sb6,
    "sym": _sym,
}
