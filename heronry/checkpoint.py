"""Models from files and into files.

`load` takes every format of formats/: BlinkDL's .pth, the same tensors as .safetensors, a folder that `save` wrote
(config.json and model.safetensors), Hugging Face's folders, GGUF and others. Generation and sizes are read off the
tensors. A file is mapped, never held: each tensor is copied once, in the dtype asked for, so that loading costs the
memory of the model and no more.

A quantized model is saved in a layout of its own kind, row after row: under the name of a matrix int8 [out, in], or
uint8 [out, in / 2] (of every 8 columns' codes, number i in the low and i + 4 in the high half of a byte), and beside it
its float16 `.scales` [out, in / 32]. ops/packed says what they stand for.

A tuned initial state is a file of its own, with `blocks.i.att.time_state` of every layer and nothing else: BlinkDL's
.pth, or the .safetensors that `save_time_state` writes, which also says to which model it belongs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypeVar

from . import formats, hub
from .errors import InputError
from .files import atomic_write
from .formats.lazy_tensor import LazyTensor, Tensors, metadata, stored
from .memory import Arena
from .models import MODELS, VISION_MODELS, Model, Network, State, VisionModel, detect
from .models.fingerprint import compute_fingerprint, sample
from .models.layers import PackedLinear
from .ops.packed import GROUP, untile
from .progress import ByteCounter, Progress
from .quantization import FORMATS, check, matrices, replace_matrix

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

KNOWN = [*MODELS, *VISION_MODELS]
M = TypeVar("M", bound=Network, default=Model)

QUANTIZED = ("quantization", "fingerprint")  # what it says of a quantized model: the format, whose states fit
NOTES = ("chat_template", "opening_tokens", "labels")  # what a config.json may say besides the sizes
TIME_STATE = "heronry.time_state"  # the format that the metadata of a tuned state name


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
        path: a file or folder of any format in docs/conversion.md, a folder that `save` wrote, or one of the hub's:
            "hf://OWNER/REPOSITORY/FILE", "OWNER/REPOSITORY".
        dtype: of the weights, "float32", "bfloat16" or "float16" or as torch names them; None keeps the file's.
        device: where the model goes.
        ln_x_eps: of the norm after the recurrence (RWKV-5 to 7), for files that want another than 64e-5.
        quantize: "int8" or "int4" packs the large matrices as they are read; `dtype` is then that of all others.
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
    target = None if dtype is None else _dtype(dtype)
    where = _device(device)
    try:
        checkpoint = formats.read(path)
        tensors, config = checkpoint.tensors, checkpoint.config
        model = assemble(tensors, config, target, where, ln_x_eps, quantize, kind=kind, progress=progress)
        return model, checkpoint
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def notes(described: Mapping[str, Any]) -> dict[str, Any]:
    """What LLM should know, of what a checkpoint says of itself."""
    return {key: described[key] for key in NOTES if key in described}


def locate(path: str | Path) -> Path:
    """The path with ~ expanded, or where the hub's file of that name lies; for the model.safetensors of a folder of
    ours or Hugging Face's the folder, whose config.json may say what the tensors do not."""
    path = hub.fetch(path) if hub.is_name(path) else Path(path).expanduser()
    if path.name == "model.safetensors" and os.path.isfile(path.parent / "config.json"):
        try:
            described = json.loads((path.parent / "config.json").read_text())
        except (OSError, ValueError):
            return path  # somebody else's; the tensors alone are enough
        if isinstance(described, dict) and (described.get("model") in KNOWN or "model_type" in described):
            return path.parent
    return path


def save(
    model: Network,
    folder: str | Path,
    tokenizer_file: str | Path | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and model.safetensors, and a copy of the tokenizer's file as tokenizer.json (.txt, ...).

    All files are written before the first takes the place of an old one.

    notes: what LLM should know of the model: "chat_template" (a name in engine/chat.py) and "opening_tokens" (the
        ids that stood in front of every text in training); of pictures "labels" (the names of the classes).
    """
    unknown = [key for key in notes or {} if key not in NOTES]
    if unknown:
        raise InputError(f"there is no note {unknown[0]!r}; known are {', '.join(NOTES)}")
    if model.adapted_from is not None:
        raise InputError(
            "this model has adapters beside its matrices: save_adapter writes them, `heronry merge` a model"
        )
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give the name of a folder")
    tokenizer = None if tokenizer_file is None else Path(tokenizer_file).expanduser()
    if tokenizer is not None and not tokenizer.is_file():
        raise InputError(f"{tokenizer}: tokenizer file not found")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    about = {"model": model.name, **asdict(model.config), **(notes or {})}
    if model.quantization is not None:
        about |= {"quantization": model.quantization, "fingerprint": model.fingerprint}
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                tensors[f"{name}.weight"], tensors[f"{name}.scales"] = _in_rows(module)
    described = json.dumps(about, indent=2)
    with atomic_write(folder / "model.safetensors") as weights, atomic_write(folder / "config.json") as config:
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(described + "\n")
        if tokenizer is not None:
            with atomic_write(folder / f"tokenizer{tokenizer.suffix}") as copy:
                shutil.copyfile(tokenizer, copy)


def save_time_state(model: Model, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Writes the tuned initial state of a model as a .safetensors file (atomically), under BlinkDL's names. `notes` as
    for `save`."""
    if not model.config.time_state:
        raise InputError("this model has no tuned initial state; tune_state() gives it one")
    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in model.time_states()}
    about = {"format": TIME_STATE, "fingerprint": model.fingerprint, "notes": json.dumps(dict(notes or {}))}
    with atomic_write(Path(path).expanduser()) as part:
        save_file(tensors, part, metadata=about)


def read_time_state(path: str | Path, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tuned initial state for this model: tensors by name, [H, N_v, N_k], of RWKV-4 [2, A], in float32 (float64 for a
    float64 model) where the model is; and the notes that were saved with it.

    path: what `save_time_state` wrote, or a .pth or .safetensors of BlinkDL's, which can only be told by its shapes.

    Raises:
        InputError: no such file, a damaged one, something else, or the state of another model.
    """
    path = Path(path).expanduser()
    try:
        if not os.path.exists(path):
            raise InputError("no such state file")
        tensors = formats.read(path).tensors
        wanted = model.time_states()
        if tensors.keys() != wanted.keys():
            found = (", ".join(list(tensors)[:2]) or "nothing") + (", ..." if len(tensors) > 2 else "")
            kind = f"blocks.0 to {len(wanted) - 1}.att.time_state"
            raise InputError(f"not a tuned state of this model: it holds {found} instead of {kind}")
        for name, shape in wanted.items():
            x = tensors[name]
            if not x.is_floating_point or x.shape != shape:
                raise InputError(
                    f"the tuned state of another model: {name} is {list(x.shape)} instead of {list(shape)}"
                )
        about = metadata(path)
        if about.get("fingerprint", model.fingerprint) != model.fingerprint:
            raise InputError("this state was tuned on another model")
        notes = json.loads(about.get("notes", "{}"))
        for key, value in notes.items():
            check_note(key, value)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    like = model.emb.weight
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {name: x.read().to(like.device, dtype) for name, x in tensors.items()}, notes


def initial_state(path: str | Path, model: Model) -> State:
    """The state of one row in a file of `read_time_state`'s: what a text begins from, in place of nothing. The model
    stays as it is."""
    return model.initial_state(time_states=read_time_state(path, model)[0])


def identify(
    tensors: Tensors, described: Mapping[str, Any] | None = None, ln_x_eps: float | None = None
) -> tuple[type[Network], Any]:
    """Class and configuration of the model that these tensors are, all of them. Wrappers' prefixes and what the class
    never reads are taken out of `tensors`; packed matrices count with the shapes they stand for.

    Raises:
        InputError: they make no model, or not the one that is described.
    """
    described = described or {}
    if described and described.get("model") not in KNOWN:
        raise InputError(f'config.json names no model; "model" must be one of {", ".join(KNOWN)}')
    for key in list(tensors):
        plain = key.removeprefix("_forward_module.").removeprefix("_orig_mod.")  # DeepSpeed's wrapper, torch.compile's
        if plain != key and plain in tensors:
            raise InputError(f"{plain} is there twice, as {key} too")
        tensors[plain] = tensors.pop(key)
    cls = detect({key: x.shape for key, x in tensors.items()})
    for key in cls.ignored_keys:
        tensors.pop(key, None)
    shapes = _unpacked_shapes(tensors, described.get("quantization"))
    config = _config(cls, shapes, described, ln_x_eps)
    _compare(_skeleton(cls, config).state_dict(), shapes)
    return cls, config


def _wrong_kind(cls: type[Network], kind: type[Network]) -> str:
    """The error message for a model of class `cls` where one of `kind` is expected."""
    if issubclass(cls, VisionModel) and issubclass(kind, Model):
        return f"this model ({cls.name}) reads pictures, not text; load it with kind=VisionModel"
    if issubclass(cls, Model) and issubclass(kind, VisionModel):
        return f"this model ({cls.name}) reads text, not pictures; load it with kind=Model"
    return f"this model is of the class {cls.__name__}, not {kind.__name__}"


def _skeleton(cls: type[M], config: Any) -> M:
    with torch.device("meta"):  # takes no memory
        return cls(config)


def assemble(
    tensors: Mapping[str, Tensor | LazyTensor],
    described: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ln_x_eps: float | None = None,
    quantize: str | None = None,
    *,
    kind: type[M] = Model,  # type: ignore[assignment]
    progress: Progress | None = None,
) -> M:
    """A model, in eval mode, out of tensors under BlinkDL's names. `described` is what a config.json says; all other
    arguments are those of `load`."""
    described = described or {}
    found = stored(tensors)
    cls, config = identify(found, described, ln_x_eps)
    if not issubclass(cls, kind):
        raise InputError(_wrong_kind(cls, kind))
    bytes_read = ByteCounter(sum(x.nbytes for x in found.values()), progress)
    packed = _take_packed(found, described.get("quantization"))
    model = _skeleton(cls, config)
    skeleton = model.state_dict()
    if dtype is None:
        dtype = _majority(found.values())
    if packed:
        model.quantization = described["quantization"]
    if quantize is not None:
        check(model, quantize)
        model.quantization = quantize
    large, small = Arena(device), Arena(device)  # apart, for quantizing gives the matrices back and nothing else
    strict = model.quantization is None
    samples: dict[str, bytes] = {}

    def take(key: str) -> Tensor:
        """Its numbers, which are nowhere else once they are copied; none of a model that is only looked at."""
        held = found.pop(key)
        bytes_read.add(held.nbytes)
        if torch.device(device).type == "meta" and quantize is None:
            return skeleton[key]
        return held.read().reshape(skeleton[key].shape)

    for name, _ in matrices(model):  # one matrix at a time is there twice
        key = f"{name}.weight"
        if key in packed:
            q, scales = packed.pop(key)
            bytes_read.add(q.nbytes + scales.nbytes)
        elif quantize is not None:
            x = take(key)
            q, scales = FORMATS[quantize](x)
            samples[key] = sample(x)
        else:
            continue
        replace_matrix(model, name, q.to(device), scales.to(device), large)
    in_matrices = {f"{name}.weight" for name, _ in matrices(model)}
    copied = {}
    for name in list(found):
        arena = large if name in in_matrices else small
        x = take(name)
        copied[name] = arena.allocate(skeleton[name].shape, dtype).copy_(x)
        if not x.is_meta:
            samples[name] = sample(x)  # after the copy, which reads a mapped file in order
    model.load_state_dict(copied, assign=True, strict=strict)
    model.eval()
    own = described.get("fingerprint") if model.quantization and not quantize else None
    model.set_fingerprint(own or (compute_fingerprint(cls.name, config, samples) if samples else None))
    return model


def _in_rows(module: PackedLinear) -> tuple[Tensor, Tensor]:
    """The packed matrix as it lies in a file."""
    q, scales = untile(module.weight.cpu(), module.scales.cpu(), module.out_features)
    return q.contiguous(), scales.contiguous()


def _unpacked_shapes(tensors: Tensors, format: Any) -> dict[str, torch.Size]:
    """Of all tensors, packed matrices with the shape that they stand for."""
    for key, x in tensors.items():
        if not x.is_floating_point and not (format and f"{key.removesuffix('weight')}scales" in tensors):
            raise InputError(f"{key} is {x.dtype}, not a floating point tensor; use the original checkpoint")
    if format is None:
        return {key: x.shape for key, x in tensors.items()}
    if format not in FORMATS:
        raise InputError(f"config.json says quantization = {format!r}; known are {', '.join(FORMATS)}")
    kind, groups = (torch.int8, GROUP) if format == "int8" else (torch.uint8, GROUP // 2)
    shapes = {key: x.shape for key, x in tensors.items() if not key.endswith(".scales")}
    for key in tensors.keys() - shapes.keys():
        weight = f"{key.removesuffix('scales')}weight"
        scales, q = tensors[key], tensors.get(weight)
        if q is None or q.dtype != kind or scales.dtype != torch.float16 or len(q.shape) != 2 or len(scales.shape) != 2:
            raise InputError(f"{key} and its matrix are not what {format} is made of")
        if tuple(q.shape) != (scales.shape[0], scales.shape[1] * groups):
            raise InputError(f"{key} has the shape {list(scales.shape)}, which does not fit its matrix {list(q.shape)}")
        shapes[weight] = torch.Size((q.shape[0], scales.shape[1] * GROUP))
    return shapes


def _take_packed(tensors: Tensors, format: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Takes the packed matrices out of what a file holds: codes and scales by the matrix's name."""
    packed = {}
    for key in [key for key in tensors if format and key.endswith(".scales")]:
        weight = f"{key.removesuffix('scales')}weight"
        packed[weight] = (tensors.pop(weight).read(), tensors.pop(key).read())
    return packed


def _config(
    cls: type[Network], shapes: Mapping[str, torch.Size], described: Mapping[str, Any], ln_x_eps: float | None
) -> Any:
    """The configuration that the tensors show; what a config.json says must agree with it."""
    try:
        config = cls.Config.from_shapes(shapes)
    except KeyError as error:
        raise InputError(f"{error.args[0]} is missing, so this is no complete {cls.name} checkpoint") from error
    except (IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its tensors have not the shapes of an {cls.name} checkpoint ({error})") from error
    shown = {"model": cls.name, **asdict(config)}
    for key, value in described.items():
        if key in QUANTIZED:
            continue
        if key in NOTES:
            check_note(key, value)
            continue
        if key not in shown:
            raise InputError(f"config.json has an unknown key {key!r}; {cls.name} knows {', '.join(shown)}")
        if key not in cls.config_only and value != shown[key]:
            raise InputError(f"config.json says {key} = {value!r}, but the tensors say {shown[key]!r}")
    told = {key: described[key] for key in cls.config_only if key in described}
    if ln_x_eps is not None:
        told["ln_x_eps"] = ln_x_eps
    if "ln_x_eps" in told:
        eps = told["ln_x_eps"]
        if "ln_x_eps" not in shown:
            raise InputError(f"{cls.name} has no norm after its recurrence, so ln_x_eps means nothing to it")
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < math.inf:
            raise InputError(f"ln_x_eps must be a positive number like 64e-5, got {eps!r}")
        told["ln_x_eps"] = float(eps)
    try:
        return replace(config, **told)
    except TypeError as error:
        raise InputError(f"config.json has a setting of a wrong kind ({error})") from error


def check_note(key: str, value: Any) -> None:
    if key == "chat_template" and not isinstance(value, str):
        raise InputError(f"config.json says {key} = {value!r}, which is no name of a template")
    if key == "labels" and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
        raise InputError(f"config.json says {key} = {value!r}, which is no list of names")
    if key == "opening_tokens" and not (isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)):
        raise InputError(f"config.json says {key} = {value!r}, which is no list of token ids")


def _compare(skeleton: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """InputError unless the tensors are those of the model, up to sizes of 1 and flattened vectors."""
    missing = [key for key in skeleton if key not in shapes]
    unexpected = [key for key in shapes if key not in skeleton]
    wrong = [
        f"{key} {list(shapes[key])} instead of {list(x.shape)}"
        for key, x in skeleton.items()
        if key in shapes and not _fits(shapes[key], x.shape)
    ]
    told = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", wrong))
        if names
    ]
    if told:
        raise InputError("the tensors do not make a model; " + "; ".join(told))


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """The same numbers in the same order. A transposed matrix has as many numbers, but others."""
    a, b = ([size for size in sizes if size > 1] for sizes in (shape, wanted))
    return a == b or (math.prod(a) == math.prod(b) and min(len(a), len(b)) <= 1)


def _majority(tensors: Iterable[LazyTensor]) -> torch.dtype:
    """The dtype of most numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for x in tensors:
        numbers[x.dtype] += x.numel()
    dtype = numbers.most_common(1)[0][0]
    if dtype not in DTYPES.values():
        raise InputError(f"its weights are {dtype}, which no model computes in; give a dtype")
    return dtype


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return found


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise InputError(f"device {device} cannot be used ({str(error).splitlines()[0]})") from error
