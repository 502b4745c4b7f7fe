"""BlinkDL's .pth files: a pickled dictionary of tensors, as torch.save writes it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import ByteCounter
from .lazy_tensor import Tensors, as_lazy


def is_pth(head: bytes) -> bool:
    """Whether a file begins like one of PyTorch's zip archives or like a plain pickle."""
    return head.startswith((b"PK", b"\x80"))


def read(path: Path) -> Tensors:
    """The tensors of a .pth file, mapped where it is a zip archive. Code inside a pickle is refused, never run."""
    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    try:
        tensors = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(
                f"refused: the file would run {code[1]}, so it holds more than tensors; save its state_dict() instead"
            ) from None
        first = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise InputError(f"damaged or truncated .pth file ({first[:120]})") from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InputError(f"holds a {type(tensors).__name__}, not a dictionary of named tensors")
    for key in ("state_dict", "model"):  # image classification codebases store the weights under one of these
        nested = tensors.get(key)
        if isinstance(nested, dict) and any("patch_embed." in str(name) for name in nested):
            tensors = nested
    if not any(isinstance(x, Tensor) for x in tensors.values()):
        keys = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
        raise InputError(f"not an RWKV checkpoint (it holds {keys or 'nothing'})")
    return as_lazy(tensors)


def write(tensors: Tensors, path: Path, counter: ByteCounter) -> None:
    """Writes a .pth file. torch.save takes all tensors at once, so each is first copied to a mapped temporary file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        mapped = {}
        for i, (name, x) in enumerate(tensors.items()):
            copy = torch.from_file(f"{folder}/{i}", shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
            mapped[name] = copy.copy_(x.read())
            counter.add(x.nbytes)
        torch.save(mapped, path)
