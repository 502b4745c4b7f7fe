"""The weights of a folder in Hugging Face's layout: one file, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError
from ..files import read_json
from ..progress import ByteCounter
from . import pth, safetensors_file
from .lazy_tensor import Tensors

SUFFIXES = (".pth", ".gguf", ".st", ".safetensors", ".bin")  # of single files
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?"
)  # names of the files that `read` reads


def read(folder: Path) -> Tensors:
    """The tensors of model.safetensors or, in old repositories, of pytorch_model.bin, which is a .pth file; or of
    several such files with an index. As in transformers, a single file is the model where an index lies beside it."""
    for name, read_file in (("model.safetensors", safetensors_file.read), ("pytorch_model.bin", pth.read)):
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, f"{name}.index.json", read_file)
    raise InputError(f"no model.safetensors in the folder{hint(folder)}")


def hint(folder: Path) -> str:
    """The end of an error message: what a folder that holds no model holds."""
    if (folder / "zero_to_fp32.py").is_file():
        return ": a checkpoint of DeepSpeed's, whose script zero_to_fp32.py, inside, writes the weights as one file"
    if any(folder.glob("shard-*.safetensors")):
        return ", only the shards of a training run, which writes its model at the end"
    # those of a folder may not be the whole model without its config.json
    single = (path for path in folder.iterdir() if path.suffix in SUFFIXES and not WEIGHT_FILES.fullmatch(path.name))
    files = sorted(path.name for path in single)
    return f"; give one of its files: {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}" if files else ""


def _read_shards(folder: Path, index: str, read_file: Callable[[Path], Tensors]) -> Tensors:
    """The tensors of all files that an index lists, each from the file that it names."""
    file_of = read_json(folder / index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise InputError(f"{index} has no weight_map, which says the file of each tensor")
    names = sorted(set(file_of.values()))
    tensors: Tensors = {}
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{index} lists {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise InputError(f"{name} is missing, one of {len(names)} files that {index} lists")
        try:
            shard = read_file(folder / name)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        tensors |= {key: x for key, x in shard.items() if file_of.get(key, name) == name}
    missing = [key for key in file_of if key not in tensors]
    if missing:
        raise InputError(f"{missing[0]} is not in {file_of[missing[0]]}, where {index} says it is")
    return tensors


def write(tensors: Tensors, folder: Path, counter: ByteCounter, max_bytes: int) -> None:
    """Writes model.safetensors, or several files of at most `max_bytes` with an index. Files that exist are kept."""
    groups = _shard(tensors, max_bytes)
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        if (folder / name).is_file():
            counter.add(sum(x.nbytes for x in group.values()))
            continue
        part = folder / f".{name}.part"
        safetensors_file.write(group, part, counter)
        part.replace(folder / name)
    if len(groups) > 1:
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        total = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shard(tensors: Tensors, max_bytes: int) -> list[Tensors]:
    """The tensors in groups of at most `max_bytes`, in their order; a larger tensor is a group of its own."""
    groups: list[Tensors] = [{}]
    size = 0
    for name, x in tensors.items():
        if groups[-1] and size + x.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = x
        size += x.nbytes
    return groups
