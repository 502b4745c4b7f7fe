"""Tensors that are read when they are wanted, and the files that hold them as they are: .pth and .safetensors."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
INDEX = "model.safetensors.index.json"


class LazyTensor:
    """A tensor in a file: shape and dtype are known, `read` gives the numbers, as often as it is called."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, read: Callable[[], Tensor]):
        self.shape, self.dtype, self.read = torch.Size(shape), dtype, read

    @classmethod
    def of(cls, x: Tensor) -> LazyTensor:
        """One that is there; mapped from a file it takes no memory."""
        x = x.detach()
        return cls(x.shape, x.dtype, lambda: x)

    @classmethod
    def made(cls, make: Callable[..., Tensor], *parts: LazyTensor) -> LazyTensor:
        """What `make` gives of the tensors `parts`, computed whenever it is read."""
        shown = make(*(torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts))
        return cls(shown.shape, shown.dtype, lambda: make(*(part.read() for part in parts)))

    def map(self, make: Callable[[Tensor], Tensor]) -> LazyTensor:
        return LazyTensor.made(make, self)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        return self if dtype == self.dtype else self.map(lambda x: x.to(dtype))

    @property
    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize


Tensors = dict[str, LazyTensor]
Progress = Callable[[int], object]  # is told of bytes that are written


def read_pth(path: Path) -> Tensors:
    """The tensors of a .pth file. Code inside a pickle is refused, never run."""
    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        tensors = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(
                f"refused, for it holds more than tensors: it wants to run {code[1]}; save its state_dict() instead"
            ) from None
        first = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise InputError(f"damaged or truncated .pth file ({first[:120]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InputError(f"holds a {type(tensors).__name__}, not a dictionary of named tensors")
    for key in ("state_dict", "model"):  # as programs that train on pictures keep them, beside what else they keep
        inside = tensors.get(key)
        if isinstance(inside, dict) and any("patch_embed." in str(name) for name in inside):
            tensors = inside
    if not any(isinstance(x, Tensor) for x in tensors.values()):
        keys = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
        raise InputError(f"not an RWKV checkpoint (it holds {keys or 'nothing'})")
    return stored(tensors)


def stored(tensors: Mapping[str, Any]) -> Tensors:
    """The same as `Stored`, once they are seen to be plain numbers."""
    for key, x in tensors.items():
        if isinstance(x, LazyTensor):
            continue
        if not isinstance(x, Tensor):
            raise InputError(f"{key} is {type(x).__name__}, not a floating point tensor; use the original checkpoint")
        if x.layout != torch.strided or x.is_nested or x.is_meta or x.numel() == 0:
            raise InputError(f"{key} holds no plain numbers (sparse, nested, meta or empty): save dense tensors")
        if x.nbytes > x.untyped_storage().nbytes():
            raise InputError(f"{key} holds fewer numbers than its shape claims; save contiguous tensors instead")
    return {key: x if isinstance(x, LazyTensor) else LazyTensor.of(x) for key, x in tensors.items()}


def write_pth(tensors: Tensors, path: Path, progress: Progress) -> None:
    """A .pth file. torch.save wants all tensors at once, so they lie in files of their own until it is done."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        mapped = {}
        for i, (name, x) in enumerate(tensors.items()):
            room = torch.from_file(f"{folder}/{i}", shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
            mapped[name] = room.copy_(x.read())
            progress(x.nbytes)
        torch.save(mapped, path)


def read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys()
            return stored({key: file.get_tensor(key) for key in keys})
    except (SafetensorError, OSError) as error:
        raise InputError(f"damaged or truncated safetensors file ({error})") from error


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for a .pth."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def write_safetensors(tensors: Tensors, path: Path, progress: Progress, metadata: Mapping[str, str]) -> None:
    """A safetensors file, one tensor after the other: never more than one is in memory.

    The format: the length of the header in 8 bytes, the header in JSON, the numbers.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, x in tensors.items():
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with open(path, "wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for x in tensors.values():
            write_numbers(file, x.read(), progress)


def write_numbers(file: BinaryIO, x: Tensor, progress: Progress, at_once: int = 16 << 20) -> None:
    """The bytes of a tensor, by the piece: what it is mapped from need not come into memory as a whole."""
    flat = x.reshape(-1)
    step = max(1, at_once // x.dtype.itemsize)
    for begin in range(0, len(flat), step):
        piece = flat[begin : begin + step].contiguous().view(torch.uint8)
        file.write(piece.numpy().data)
        progress(len(piece))


def read_folder(folder: Path) -> Tensors:
    """The tensors of a folder in whatever way Hugging Face's tools put them there: in one file or in several with an
    index, as safetensors or (old repositories) as .bin, which are .pth files."""
    for index, read in ((INDEX, read_safetensors), ("pytorch_model.bin.index.json", read_pth)):
        one = index.removesuffix(".index.json")
        if (folder / index).is_file():
            return _read_pieces(folder, index, read)
        if (folder / one).is_file():
            return read(folder / one)
    pieces = any(folder.glob("shard-*.safetensors"))
    what = ", only the pieces of a run, which writes its model at the end" if pieces else ""
    raise InputError(f"the folder has no model.safetensors{what}")


def _read_pieces(folder: Path, index: str, read: Callable[[Path], Tensors]) -> Tensors:
    try:
        places = json.loads((folder / index).read_text())["weight_map"]
        wanted = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} cannot be read ({error})") from error
    found: Tensors = {}
    for name in wanted:
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing, one of {len(wanted)} files that {index} names")
        try:
            found |= read(folder / name)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    missing = [key for key in places if key not in found]
    if missing:
        raise InputError(f"{missing[0]} is in none of the files that {index} names")
    return found


def shards(tensors: Tensors, most: int) -> list[Tensors]:
    """The tensors in groups of at most `most` bytes, in their order; a larger tensor is a group of its own."""
    groups: list[Tensors] = [{}]
    size = 0
    for name, x in tensors.items():
        if groups[-1] and size + x.nbytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = x
        size += x.nbytes
    return groups


def write_folder(tensors: Tensors, folder: Path, progress: Progress, most: int) -> None:
    """model.safetensors, or several files of at most `most` bytes with an index. A file that is there is not written
    again."""
    groups = shards(tensors, most)
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        if (folder / name).is_file():
            progress(sum(x.nbytes for x in group.values()))
            continue
        part = folder / f".{name}.part"
        write_safetensors(group, part, progress, {})
        part.replace(folder / name)
    if len(groups) > 1:
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        total = sum(x.nbytes for x in tensors.values())
        told = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(told, indent=2) + "\n")


def space_for(size: int, path: Path) -> None:
    """InputError where the disk of `path` has not this many bytes left."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{path}: takes {size / 1e6:,.0f} MB, and {folder} has {free / 1e6:,.0f} MB left")


# How formats differ: maps for `Stored.map`.


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-2, -1)


def squeezed(x: Tensor) -> Tensor:
    return x.reshape([size for size in x.shape if size > 1] or [1])


def nth(i: int, count: int, x: Tensor) -> Tensor:
    """One of `count` vectors that lie together, [1, 1, C]."""
    return x.reshape(count, 1, 1, -1)[i]


def times(factor: float, x: Tensor) -> Tensor:
    return x * factor
