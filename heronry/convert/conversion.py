"""From any format to any other, proved by the logits of both.

A conversion reads one tensor at a time and writes it; nothing is ever in memory as a whole. The output takes its place
once both files have been asked for the logits of the same tokens, in float32 and again matrix by matrix.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import formats
from ..checkpoint import DTYPES, QUANTIZED, assemble, identify, locate, notes
from ..errors import InputError
from ..files import atomic_write
from ..formats import ggml, gguf, huggingface, webrwkv
from ..formats.lazy_tensor import LazyTensor, Tensors, space_for, write_folder, write_pth, write_safetensors
from ..models import Model, VisionModel
from ..progress import ByteCounter, Progress
from ..text.tokenizers import guess_tokenizer, load_tokenizer

SUFFIXES = {".pth": "blinkdl", ".safetensors": "safetensors", ".st": "webrwkv", ".gguf": "gguf", ".bin": "ggml"}
FOLDERS = ("heronry", "huggingface")
PICTURES = ("vision_rwkv",)  # of models of pictures: a .pth under the authors' names
GRAPHS = ("onnx", "onnx-step")  # that are written only
SHARD = 2 << 30  # bytes of a file in a folder, unless said otherwise
PROMPT = 24  # tokens that both files are asked about
AT_ONCE = 1 << 20  # weights that are multiplied at a time


@dataclass
class Converted:
    """What came of it: the format, its size in bytes, the largest difference of a logit and the largest logit."""

    format: str
    bytes: int
    difference: float
    largest: float


def convert(
    source: str | Path,
    target: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    shard: int = SHARD,
    progress: Progress | None = None,
) -> Converted:
    """Writes the model in `source` in another format.

    Args:
        source: a file or folder of any format.
        target: a file, or a new folder. Its suffix says the format: .pth, .safetensors, .st (web-rwkv), .gguf, .bin
            (rwkv.cpp), .onnx; no suffix means a folder of ours.
        to: the format, where the name does not say it: a value of SUFFIXES or one of FOLDERS, PICTURES and GRAPHS.
        dtype: "float32", "bfloat16" or "float16", for GGUF also "q8_0"; None keeps what the source has, as far as the
            format can.
        tokenizer: as for LLM, where the target holds one; None = what lies with the source, or is known by its size.
        shard: the largest size of a file of a folder, in bytes.
        progress: called with (bytes written, bytes in all) while the target is written.

    Raises:
        InputError: what is wrong with the source, or what the target has no place for. Nothing is left behind, but
            for the finished files of a folder that was broken off, which the same call goes on from.
    """
    source, target = locate(source), Path(target).expanduser()
    to = to or _format(target)
    if to not in (known := (*SUFFIXES.values(), *FOLDERS, *PICTURES, *GRAPHS)):
        raise InputError(f"there is no format {to!r}; choose one of {', '.join(known)}")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is where the original lies; give another name")
    try:
        checkpoint = formats.read(source)
        if any(checkpoint.config.get(key) for key in QUANTIZED):
            raise InputError("its matrices are packed; convert the original")
        cls, config = identify(checkpoint.tensors, checkpoint.config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if issubclass(cls, VisionModel):
        from .vision_models import convert_pictures

        return convert_pictures(checkpoint, source, target, to, dtype)
    assert issubclass(cls, Model)
    if to == "vision_rwkv":
        raise InputError(f"{source}: is a model of text ({cls.name}), and vision_rwkv is for pictures")
    if to in GRAPHS:
        return _draw(checkpoint, target, to, dtype)
    if getattr(config, "deep_rank", 0) and to in ("huggingface", "gguf", "ggml", "webrwkv"):
        raise InputError(f"{source}: RWKV-7a (DeepEmbed) has no place in {to}")
    told = notes(checkpoint.config)
    words = _Words(source, checkpoint, config.vocab_size, tokenizer)
    tensors = _typed(checkpoint.tensors, to, dtype)
    kind = dtype or _kind(tensors)
    size = sum(x.nbytes for x in tensors.values())
    space_for(size * (2 if to == "blinkdl" else 1), target)

    written = ByteCounter(size, progress).add

    def write(part: Path) -> None:
        if to == "blinkdl":
            write_pth(tensors, part, written)
        elif to == "safetensors":
            write_safetensors(tensors, part, written, {})
        elif to == "webrwkv":
            write_safetensors(webrwkv.from_blinkdl(tensors), part, written, {})
        elif to == "ggml":
            ggml.write(tensors, part, DTYPES[kind], written)
        elif to == "gguf":
            gguf.write(tensors, config, part, kind, words.bytes(), words.text(), told, written)
        else:
            if to == "huggingface":
                about = huggingface.config_json(cls.name, config, told, DTYPES[kind])
                write_folder(huggingface.from_blinkdl(tensors), part, written, shard)
            else:
                about = {"model": cls.name, **asdict(config), **told}
                write_folder(tensors, part, written, shard)
            words.write(part, to == "huggingface")
            (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")

    if to == "gguf":
        gguf.check(tensors, config)
    wanted = logits(cls, config, checkpoint.tensors)
    stamp = json.dumps([str(source.resolve()), os.stat(source).st_mtime_ns, size, to, kind, shard])
    with atomic_write(target) if to in SUFFIXES.values() else _new_folder(target, stamp) as part:
        try:
            write(part)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        again = formats.read(part)
        difference = logits(cls, identify(again.tensors, again.config)[1], again.tensors) - wanted
        result = Converted(to, _size(part), difference.abs().max().item(), wanted.abs().max().item())
        if not difference.isfinite().all():
            raise InputError(f"{target}: not written, for a logit is no number: {kind} is too small for these weights")
        same = to in EXACT and all(x.dtype == checkpoint.tensors[name].dtype for name, x in tensors.items())
        if same and result.difference > 1e-5 * result.largest:
            raise InputError(f"{target}: not written, for its logits are not those of {source}")
    return result


def _draw(checkpoint: formats.Checkpoint, target: Path, to: str, dtype: str | None) -> Converted:
    """The model as a graph, and what onnxruntime makes of it."""
    from . import onnx

    if dtype not in (None, "float32"):
        raise InputError(f"ONNX files are float32, not {dtype}")
    model = assemble(checkpoint.tensors, checkpoint.config, torch.float32)
    space_for(sum(p.nbytes for p in model.parameters()), target)
    tokens = _prompt(model.config.vocab_size)
    with torch.no_grad():
        wanted = model(tokens)[0]
    with atomic_write(target) as part:
        onnx.write(model, part, target.name, step=to == "onnx-step")
        difference = onnx.logits(part, tokens, model) - wanted
        result = Converted(to, _size(part), difference.abs().max().item(), wanted.abs().max().item())
        if not result.difference <= 1e-4 * max(1.0, result.largest):
            raise InputError(f"{target}: not written, for onnxruntime's logits are {result.difference:.2g} away")
    return result


EXACT = ("blinkdl", "safetensors", *FOLDERS)  # that hold any dtype


def _format(target: Path) -> str:
    if target.suffix in SUFFIXES:
        return SUFFIXES[target.suffix]
    if target.suffix == ".onnx":
        return "onnx"
    if target.suffix and not target.is_dir() and target.suffix[1:].isalpha():
        raise InputError(f"{target}: no known format has the suffix {target.suffix}; say it with --to")
    return "heronry"


def _typed(tensors: Tensors, to: str, dtype: str | None) -> Tensors:
    """The tensors in the dtypes that the target gets, where the format leaves a choice."""
    if to == "webrwkv":
        if dtype not in (None, "float16"):
            raise InputError(f"web-rwkv's files are float16, not {dtype}")
        dtype = "float16"
    if to in ("gguf", "ggml"):  # these say themselves which tensors stay float32
        return tensors
    if dtype is None:
        return tensors
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not supported; choose one of {', '.join(DTYPES)}")
    return {name: x.to(DTYPES[dtype]) for name, x in tensors.items()}


def _kind(tensors: Tensors) -> str:
    """The dtype of the embedding, which stands for all large matrices."""
    return next(name for name, dtype in DTYPES.items() if dtype == tensors["emb.weight"].dtype)


class _Words:
    """The tokenizer of a model that is converted, as each format wants it."""

    def __init__(self, source: Path, checkpoint: formats.Checkpoint, size: int, wanted: str | Path | None):
        self.inside = checkpoint.tokenizer if wanted is None else None
        self.spec: str | Path | None = wanted
        if wanted is None and self.inside is None:
            with suppress(InputError):  # then it is to be named with the copy as with the original
                self.spec = guess_tokenizer(size, source if source.is_dir() else source.parent)
        if wanted is not None:
            load_tokenizer(wanted, size)  # must fit

    def text(self) -> str | None:
        """A tokenizer.json."""
        if self.inside is not None or self.spec in (None, "bytes", "world"):
            return self.inside
        path = Path(self.spec or "")
        return (path / "tokenizer.json" if path.is_dir() else path).read_text(encoding="utf-8")

    def bytes(self) -> Sequence[bytes] | None:
        """What each id stands for, if that can be said."""
        if self.spec not in ("bytes", "world"):
            return None
        return load_tokenizer(self.spec).vocabulary  # type: ignore[attr-defined]

    def write(self, folder: Path, theirs: bool) -> None:
        """tokenizer.json, and in Hugging Face's folder the file that names its class."""
        text = self.text()
        if text is not None:
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        if theirs and (text is not None or self.spec is not None):
            told = {"tokenizer_class": "PreTrainedTokenizerFast"}
            if text is None:
                told = {"tokenizer_class": "RwkvTokenizer", "vocabulary": str(self.spec)}
            (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")


@contextmanager
def _new_folder(target: Path, stamp: str) -> Iterator[Path]:
    """A folder beside `target` that becomes it once the block has ended. If it does not end, the files that are
    finished stay for the next try with the same stamp."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; give the name of a new folder")
    part = target.parent / f".{target.name}.part"
    journal = part / ".conversion.json"
    if part.exists() and (not journal.is_file() or journal.read_text() != stamp):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    journal.write_text(stamp)
    try:
        yield part
    except InputError as error:
        if not isinstance(error.__cause__, OSError):  # a full disk may be emptied
            shutil.rmtree(part)
        raise
    journal.unlink()
    if target.exists():
        target.rmdir()
    part.rename(target)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


@torch.inference_mode()
def logits(cls: type[Model], config: Any, tensors: Mapping[str, LazyTensor]) -> Tensor:
    """Of a fixed prompt, [1, T, V] in float32. Of the large matrices a few rows are in memory at a time."""
    with torch.device("meta"):
        model = cls(config).eval()
    model.native_step_enabled = False  # C++ wants all weights at once
    shapes = model.state_dict()
    streamed = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for name, module in streamed.items():
        kind = _Product if isinstance(module, nn.Linear) else _Lookup
        model.set_submodule(name, kind(tensors[f"{name}.weight"], module.weight.shape))
    rest = {name: tensors[name].read().float().reshape(shapes[name].shape) for name in model.state_dict()}
    model.load_state_dict(rest, assign=True)
    return model(_prompt(config.vocab_size))[0]


def _prompt(vocab_size: int) -> Tensor:
    return torch.arange(1, PROMPT + 1)[None] * 7919 % vocab_size


class _Product(nn.Module):
    """A `Linear` whose weight [out, in] stays in its file: some rows of it are float32 at a time."""

    def __init__(self, stored: LazyTensor, shape: torch.Size):
        super().__init__()
        self.stored, self.shape = stored, shape

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stored.read().reshape(self.shape)
        rows = max(1, AT_ONCE // self.shape[1])
        return torch.cat([F.linear(x, some.float().contiguous()) for some in weight.split(rows)], dim=-1)


class _Lookup(_Product):
    """The same of an embedding [V, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stored.read().reshape(self.shape)[x].float()
