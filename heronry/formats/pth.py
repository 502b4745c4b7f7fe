"""BlinkDL's .pth files: a pickled dictionary of tensors, as torch.save writes it; also in a trainer's checkpoint."""

from __future__ import annotations

import pickletools
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import ByteCounter
from . import scaled_pth
from .lazy_tensor import Tensors, as_lazy
from .safetensors_file import write_numbers

# where trainers store the weights: Lightning and image classification, DeepSpeed, others
WRAPPERS = ("state_dict", "module", "model", "model_state_dict")


def is_pth(head: bytes) -> bool:
    """Whether a file begins like one of PyTorch's zip archives or like a plain pickle."""
    return head.startswith((b"PK", b"\x80"))


def read(path: Path) -> Tensors:
    """The tensors of a .pth file, mapped where it is a zip archive. Code inside a pickle is refused, never run."""
    try:
        mapped = _can_be_mapped(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # `_explain` says it
            tensors = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(_explain(path, error)) from None
    tensors = _unwrap(tensors)
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InputError(f"holds a {type(tensors).__name__}, not a dictionary of named tensors")
    if "_strategy" in tensors:
        raise InputError("converted by the rwkv package for one strategy; use the original")
    if scaled_pth.is_scaled(tensors):
        tensors = {name: x for name, x in tensors.items() if name != scaled_pth.META}
    if not any(isinstance(x, Tensor) for x in tensors.values()):
        keys = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
        raise InputError(f"not an RWKV checkpoint (it holds {keys or 'nothing'})")
    return as_lazy(tensors, mapped)


def _can_be_mapped(path: Path) -> bool:
    """Whether a file holds the numbers as this machine has them in memory."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return False
        archive = zipfile.ZipFile(file)
        orders = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/byteorder")]
        return orders in ([], [sys.byteorder])


def _unwrap(contents: Any) -> Any:
    """The weights in a trainer's checkpoint, beside which are its optimizer's states and others; `contents` itself if
    it is none."""
    while isinstance(contents, dict):
        nested = next((contents[key] for key in WRAPPERS if isinstance(contents.get(key), dict)), None)
        if nested is None:
            break
        contents = nested
    return contents


def _explain(path: Path, error: Exception) -> str:
    """Why torch does not read a file, in one line."""
    names, protocol = [], 0
    with suppress(Exception):  # what comes before the damage counts
        for opcode, argument in _opcodes(path):
            if opcode == "PROTO":
                protocol = max(protocol, argument)
            elif opcode in ("GLOBAL", "INST"):
                names.append(argument.replace(" ", "."))
            elif opcode == "STACK_GLOBAL":
                names.append(".".join(argument))
    named = re.search(r"GLOBAL (\S+)", str(error))  # by torch, which knows what is safe
    code = (
        named[1] if named else next((name for name in names if not name.startswith(("torch.", "collections."))), None)
    )
    if code is not None and code.startswith("bitsandbytes."):
        return "quantized by bitsandbytes, which is not supported; use the original checkpoint"
    if code is not None and path.suffix == ".rwkvq":
        return "rwkv-quant's first .rwkvq, a pickle of its own classes; write it again with its newer versions"
    if code is not None:
        return f"would run {code}; refused, because a checkpoint holds tensors and no code (save its state_dict())"
    if protocol > 2 and "Unsupported operand" in str(error):
        return f"written with pickle's protocol {protocol}; save it with torch.save and its default protocol"
    lines = [line.strip() for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines()]
    reason = next(filter(None, lines), type(error).__name__).partition(". This is an internal")[0]  # then advice
    return f"damaged or truncated .pth file ({reason})"


def _opcodes(path: Path) -> Iterator[tuple[str, Any]]:
    """The instructions of the pickles in a file and their arguments, none of which is run. That of STACK_GLOBAL, which
    takes them from the stack, is the last two strings."""
    with open(path, "rb") as file:
        pickles: list[IO[bytes]] = [file]
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        if is_zip:
            archive = zipfile.ZipFile(file)
            pickles = [archive.open(name) for name in archive.namelist() if name.endswith(".pkl")]
        for pickled in pickles:
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(pickled):
                if isinstance(argument, str):
                    strings.append(argument)
                yield opcode.name, strings[-2:] if opcode.name == "STACK_GLOBAL" else argument


def write(tensors: Tensors, path: Path, counter: ByteCounter) -> None:
    """Writes a .pth file. torch.save takes all tensors at once, so each is first written to a temporary file, which is
    then mapped: memory mapped to be written would kill the process where the disk is full."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        mapped = {}
        for i, (name, x) in enumerate(tensors.items()):
            with open(f"{folder}/{i}", "wb") as file:
                write_numbers(file, x.read(), counter)
            mapped[name] = torch.from_file(file.name, shared=False, size=x.numel(), dtype=x.dtype).view(x.shape)
        save(mapped, path)


def save(content: object, path: Path) -> None:
    """torch.save, but what the system says of a write that fails is an OSError: torch hides it."""
    failed: list[OSError] = []
    with open(path, "wb", buffering=0) as file:

        def write(data: bytes) -> int:
            try:
                view = memoryview(data)
                while view:  # the system may take less than all
                    view = view[file.write(view) :]
                return len(data)
            except OSError as error:
                failed.append(error)
                raise

        try:
            torch.save(content, SimpleNamespace(write=write, flush=file.flush))
        except RuntimeError as error:
            if failed:
                raise failed[0] from error
            raise
