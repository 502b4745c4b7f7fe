"""Models from files.

`load` reads every format of formats/: BlinkDL's .pth, the same tensors as .safetensors, a folder written by `save`
(config.json and model.safetensors), Hugging Face's folders, GGUF and others. Generation and sizes are read off the
tensors. A file is mapped: each tensor is copied once, in the target dtype, so that loading takes the memory of the
model and no more.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeVar

from .. import catalog, formats, hub
from ..errors import InputError, count
from ..files import read_json
from ..formats.folder import WEIGHT_FILES
from ..formats.lazy_tensor import LazyTensor, as_lazy
from ..memory import Arena
from ..models import Model, Network, VisionModel
from ..models.fingerprint import compute_fingerprint, sample
from ..progress import ByteCounter, Progress
from ..quantization import check_quantizable, pack_matrix, pack_quantized, quantizable_matrices, replace_matrix
from .identification import NAMES, identify, on_meta
from .packed_layout import pop_packed

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_ALIASES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

log = logging.getLogger("heronry")

M = TypeVar("M", bound=Network, default=Model)


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ln_x_eps: float | None = None,
    quantize: str | None = None,
    *,
    kind: type[M] = Model,  # type: ignore[assignment]  # mypy does not apply the TypeVar's default here
    progress: Progress | None = None,
) -> M:
    """Loads the model in a file or folder, in eval mode.

    Args:
        path: a file or folder of any format in docs/conversion.md, a folder that `save` wrote, or a name on the Hugging
            Face hub: "hf://OWNER/REPOSITORY/FILE", "OWNER/REPOSITORY".
        dtype: of the weights, as a string ("float32", "bfloat16", "float16", "float64", or "fp32", "bf16", "fp16",
            "fp64") or as a torch.dtype; None keeps that of the file, or of most of its weights.
        device: of the weights.
        ln_x_eps: epsilon of the norm after the recurrence (RWKV-5 to 7), for files made with another one than 64e-5.
        quantize: "int8" or "int4" quantizes the large matrices as they are read; `dtype` then applies to the rest.
        kind: Model for text, VisionModel for pictures, Network for both; or the class of one generation.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        InputError: what is wrong with the file, in one line. Code inside a pickle is refused, never run.
    """
    return load_checkpoint(path, dtype, device, ln_x_eps, quantize, kind=kind, progress=progress)[0]


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    ln_x_eps: float | None = None,
    quantize: str | None = None,
    *,
    kind: type[M] = Model,  # type: ignore[assignment]
    progress: Progress | None = None,
) -> tuple[M, formats.Checkpoint]:
    """As `load`; also returns the checkpoint, for its config and tokenizer."""
    path = locate(path)
    target_dtype, target_device = None if dtype is None else parse_dtype(dtype), parse_device(device)
    try:
        checkpoint = formats.read(path)
        tensors, config = checkpoint.tensors, checkpoint.config
        model = assemble(tensors, config, target_dtype, target_device, ln_x_eps, quantize, kind=kind, progress=progress)
        return model, checkpoint
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def locate(path: str | Path) -> Path:
    """The local path of a checkpoint: of a short name (see catalog.py), of a file downloaded from the hub, or of a
    local file, with ~ expanded and the .pth that its name may lack.

    A file of the weights in a folder whose config.json is heronry's or Hugging Face's becomes the folder, because that
    config.json may contain what the tensors do not show.

    Raises:
        InputError: there is no such file, or it is known but not downloaded.
    """
    if not str(path):
        raise InputError("the name of a model must not be empty")
    name = str(path)
    path = catalog.find(name) or (hub.fetch(name) if hub.is_name(name) else Path(name).expanduser())
    if not os.path.exists(path):
        if os.path.isfile(f"{path}.pth"):  # as PyPI's rwkv names files
            return Path(f"{path}.pth")
        raise InputError(f"{name}: no such file or folder{catalog.hint(name)}")
    if WEIGHT_FILES.fullmatch(path.name) and os.path.isfile(path.parent / "config.json"):
        try:
            config = read_json(path.parent / "config.json")
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if config.get("model") in NAMES or "model_type" in config:
            return path.parent
    return path


def assemble(
    tensors: Mapping[str, Tensor | LazyTensor],
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ln_x_eps: float | None = None,
    quantize: str | None = None,
    *,
    kind: type[M] = Model,  # type: ignore[assignment]
    progress: Progress | None = None,
) -> M:
    """Builds a model, in eval mode, from tensors under BlinkDL's names.

    config: of the checkpoint, like that of heronry's config.json. The other arguments are those of `load`.
    """
    config = config or {}
    remaining = as_lazy(tensors)
    cls, model_config = identify(remaining, config, ln_x_eps)
    if not issubclass(cls, kind):
        raise InputError(_wrong_kind(cls, kind))
    counter = ByteCounter(sum(x.nbytes for x in remaining.values()), progress)
    packed = pop_packed(remaining, config)
    model = on_meta(cls, model_config)
    expected: dict[str, Tensor] = model.state_dict()
    on_meta_device = torch.device(device).type == "meta"
    may_round = False  # with a dtype that was asked for, it is no surprise
    if dtype is None:
        dtype = _main_dtype(remaining.values())
        if dtype not in DTYPES.values() and not on_meta_device:
            raise InputError(f"its weights are {_name(dtype)}, in which models cannot compute; give a dtype (--dtype)")
        may_round = True
    if packed:
        model.quantization = config["quantization"]
    # heronry's quantized files store the fingerprint of the original weights
    stored = config.get("fingerprint") if packed else None
    if quantize is not None:
        check_quantizable(model, quantize)
        model.quantization = quantize
    # separate, because quantizing later frees the matrices and nothing else
    matrix_arena, arena = Arena(device), Arena(device)
    samples: dict[str, bytes] = {}

    def take(key: str) -> Tensor:
        """Removes a tensor from `remaining` and returns its numbers. For a model on meta the file is not read."""
        lazy = remaining.pop(key)
        counter.add(lazy.nbytes)
        if on_meta_device and quantize is None:
            return expected[key]
        x = lazy.read() if lazy.dtype in DTYPES.values() else lazy.read().to(dtype)  # torch has no functions of float8
        return x.reshape(expected[key].shape)

    for name, _ in quantizable_matrices(model):  # one matrix at a time, so that only one is in memory twice
        key = f"{name}.weight"
        if key in packed:
            lazy_q, lazy_scales = packed.pop(key)
            counter.add(lazy_q.nbytes + lazy_scales.nbytes)
            q, scales = (x.on_meta() if on_meta_device else x.read() for x in (lazy_q, lazy_scales))
            if not on_meta_device and not stored:
                samples[key] = sample(q) + sample(scales)
            replace_matrix(model, name, pack_quantized(key, q, scales, matrix_arena))
            lazy_q.drop_pages()
            lazy_scales.drop_pages()
        elif quantize is not None:
            lazy, x = remaining[key], take(key)
            samples[key] = sample(x)
            replace_matrix(model, name, pack_matrix(key, x, quantize, matrix_arena))
            lazy.drop_pages()
    matrix_keys = {f"{name}.weight" for name, _ in quantizable_matrices(model)}
    copies, rounded = {}, []
    for key in list(remaining):
        empty = (matrix_arena if key in matrix_keys else arena).allocate(expected[key].shape, dtype)
        lazy, x = remaining[key], take(key)
        copies[key] = empty.copy_(x)
        if may_round and not x.is_meta and _is_rounded(empty, x):
            rounded.append(x.dtype)
        if not x.is_meta:
            samples[key] = sample(x)  # after the copy, which reads a mapped file in order
        lazy.drop_pages()
    if rounded:
        widest = max(rounded, key=lambda x: torch.finfo(x).bits)
        log.warning(
            f"heronry: {count(len(rounded), 'tensor')} of the file in {_name(widest)} rounded to {_name(dtype)}, the "
            "dtype of most weights, because a model has one dtype; give dtype (--dtype) to choose another"
        )
    model.load_state_dict(copies, assign=True, strict=model.quantization is None)
    model.eval()
    if isinstance(model, Model) and not model.native_step_enabled and not on_meta_device:
        log.warning("heronry: %s has no step in C++: each token runs in PyTorch, which takes longer", model.generation)
    model.set_fingerprint(stored or (compute_fingerprint(cls.name, model_config, samples) if samples else None))
    return model


def _wrong_kind(cls: type[Network], kind: type[Network]) -> str:
    """The error message for a model of class `cls` where one of `kind` is expected."""
    if issubclass(cls, VisionModel) and issubclass(kind, Model):
        return f"this model ({cls.name}) reads pictures, not text; load it with kind=VisionModel"
    if issubclass(cls, Model) and issubclass(kind, VisionModel):
        return f"this model ({cls.name}) reads text, not pictures; load it with kind=Model"
    return f"this model is of the class {cls.__name__}, not {kind.__name__}"


def _main_dtype(tensors: Iterable[LazyTensor]) -> torch.dtype:
    """The dtype of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for x in tensors:
        counts[x.dtype] += x.numel()
    return counts.most_common(1)[0][0]


def _is_rounded(copy: Tensor, x: Tensor) -> bool:
    """Whether a copy in another dtype has other numbers."""
    if copy.dtype == x.dtype or torch.finfo(x.dtype).bits < torch.finfo(copy.dtype).bits:
        return False
    parts = zip(copy.flatten().split(1 << 20), x.flatten().split(1 << 20), strict=True)  # a little memory at a time
    return not all(torch.equal(a.to(x), b) for a, b in parts)


def _name(dtype: torch.dtype) -> str:
    """ "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype by its name or as it is; InputError unless models can have it."""
    parsed = DTYPES.get(DTYPE_ALIASES.get(dtype, dtype)) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in DTYPES.values():
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return parsed


def parse_device(device: torch.device | str) -> torch.device:
    """A device by its name or as it is; InputError where it cannot be used."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # the latter from a torch without CUDA
        raise InputError(f"device {device} cannot be used ({str(error).splitlines()[0]})") from error
