"""The configuration of a run: a TOML file with five sections, in which every value has a default that works.

Unknown keys, values of the wrong type and impossible values are refused, in one line, before anything else happens.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown_name
from ..models import MODELS, VISION_MODELS
from ..models.vision import SHIFTS
from ..quantization import FORMATS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TUNED = ("all", "state", "lora", "dora")
PRECISIONS = ("auto", "bfloat16", "float32", "float64")
SHARDS = ("none", "gradients", "full")
ORDERS = ("documents", "carried", "shuffle", "magic_prime", "random", "sequential")


@dataclass(frozen=True)
class ModelSection:
    """The model."""

    path: str = ""  # a checkpoint to start from; without it, a new model of the sizes below
    # what is trained: all weights, or for a frozen model at `path` only its initial state ("state") or adapters beside
    # its matrices ("lora", "dora")
    tune: str = "all"
    rank: int = 16  # of adapters
    alpha: int = 32  # the output of an adapter is scaled by alpha / rank
    dropout: float = 0.0  # of the input of adapters
    targets: tuple[str, ...] = ()  # matrices that get adapters, like ["att.key", "value"]; default: all but the head
    quantize: str = ""  # with "lora": packs the frozen matrices, int8 or int4
    generation: str = "rwkv7"
    n_layer: int = 12
    n_embd: int = 768
    vocab_size: int = 0  # 0: the data's vocabulary, up to the next multiple of 64

    @property
    def is_vision(self) -> bool:
        """Whether it classifies images."""
        return self.generation in VISION_MODELS

    def check(self) -> None:
        if self.generation not in (known := [*MODELS, *VISION_MODELS]):
            raise InputError(f"model.generation is {self.generation!r}; known: {', '.join(known)}")
        if self.is_vision and (self.tune != "all" or self.quantize):
            raise InputError(f"model.tune={self.tune} and model.quantize do not work with {self.generation}")
        if self.tune not in TUNED:
            raise InputError(f"model.tune is {self.tune!r}; known: {', '.join(TUNED)}")
        if self.tune != "all" and not self.path:
            raise InputError(f"model.tune={self.tune} needs model.path, the model to tune")
        if self.quantize and self.tune != "lora":
            raise InputError(f"model.quantize needs model.tune=lora, got {self.tune}")
        if self.quantize and self.quantize not in FORMATS:
            raise InputError(f"model.quantize is {self.quantize!r}; known: {', '.join(FORMATS)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout must be in [0, 1), got {self.dropout}")
        _positive("model", self, "n_layer", "n_embd", "rank", "alpha")


@dataclass(frozen=True)
class DataSection:
    """The data and how they are read."""

    train: str = ""  # a token file from `heronry data`, or a binidx pair
    eval: str = ""  # another one, for evaluation
    # "documents": shuffled, isolated from each other; "carried": the same, with the state carried from row to row; or
    # windows over everything: "shuffle", "magic_prime", "random", "sequential"
    order: str = "documents"
    ctx_len: int = 1024  # tokens per row
    tbptt_chunks: int = 1  # with "carried": consecutive rows of a lane per step, with gradients through their states

    def check(self) -> None:
        if not self.train:
            raise InputError("data.train is missing: a token file (see `heronry data --help`), or a folder of images")
        if self.order not in ORDERS:
            raise InputError(f"data.order is {self.order!r}; known: {', '.join(ORDERS)}")
        _positive("data", self, "ctx_len", "tbptt_chunks")
        if self.tbptt_chunks > 1 and self.order != "carried":
            raise InputError(f"data.tbptt_chunks needs data.order=carried, got {self.order}")


@dataclass(frozen=True)
class VisionSection:
    """For image classification. data.train and data.eval are then folders with one folder per class, .parquet files or
    hf://NAME[:SPLIT]."""

    size: int = 224  # of the images, in pixels
    patch_size: int = 16
    post_norm: bool = False
    init_values: float = 0.0  # of the layer scale; 0: none
    drop_path: float = 0.0  # in the last layer; the first has 0
    decay_lr: float = 1.0  # learning rate of the decays, as a multiple of optim.lr; short runs need a higher one
    shift: str = "q"
    causal: bool = False
    crop: tuple[float, float] = (0.08, 1.0)  # smallest and largest fraction of the area to crop; 1.0, 1.0: no crop
    flip: bool = True
    rand_augment: int = 9  # magnitude, from 0 to 30, of two random augmentations per image; 0: none
    erasing: float = 0.25  # probability that a rectangle of an image is erased
    mixup: float = 0.0  # alpha of Beta(alpha, alpha); with cutmix as well, each batch gets one of the two
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    workers: int = -1  # threads that read images; -1: as many as there are cores to spare, up to 8

    def check(self) -> None:
        _positive("vision", self, "size", "patch_size", "decay_lr")
        if self.size % self.patch_size:
            raise InputError(f"vision.size is {self.size}, not a multiple of vision.patch_size = {self.patch_size}")
        if self.shift not in SHIFTS:
            raise InputError(f"vision.shift is {self.shift!r}; known: {', '.join(SHIFTS)}")
        for name in ("drop_path", "erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"vision.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("init_values", "mixup", "cutmix", "rand_augment"):
            if getattr(self, name) < 0:
                raise InputError(f"vision.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"vision.crop must be two ascending fractions in (0, 1], got {list(self.crop)}")


@dataclass(frozen=True)
class OptimSection:
    """The optimizer and the learning rate."""

    lr: float = 6e-4  # after the warm-up
    lr_final: float = 6e-5  # at the end of the run, after half a cosine
    warmup: int = 10  # steps
    muon: bool = False  # train the matrices inside the blocks by Muon instead of AdamW, at the same learning rate
    weight_decay: float = 0.1  # of matrices; see param_groups in the model's file
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-18
    clip: float = 1.0  # maximum norm of the gradients; 0: no clipping
    l2wrap: float = 1e-4  # pulls the largest logit of every position towards 0

    def check(self) -> None:
        _positive("optim", self, "lr", "eps")
        for name in ("lr_final", "warmup", "weight_decay", "clip", "l2wrap"):
            if getattr(self, name) < 0:
                raise InputError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas must be in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class RunSection:
    """How long and where to train, and what is saved and logged."""

    out: str = "out"  # the folder for the model, its checkpoints and the log
    batch: int = 8  # rows per forward pass of a process (or of a group of them: see sequence_parallel)
    accumulate: int = 1  # such passes per step
    sequence_parallel: int = 1  # this many processes share each row, a piece of its tokens each
    steps: int = 0  # length of the run; 0: see epochs
    epochs: float = 1.0  # passes over the data, if steps is 0
    # of the activations: bfloat16 (autocast), float32, float64 (for tests), or auto: bfloat16 where it is fast
    precision: str = "auto"
    checkpointing: bool = False  # store only the activations between blocks and recompute the others
    compile: bool = False  # torch.compile the model
    # what is sharded over several processes: nothing; gradients, optimizer state and, between passes, the weights
    # ("gradients"); or the weights during a pass too, except for the current block ("full")
    shard: str = "none"
    seed: int = 0
    log_every: int = 10  # steps
    eval_every: int = 500  # steps; 0: only at the end
    eval_rows: int = 0  # rows to evaluate; 0: 64 rows of tokens, or all images
    ema: float = 0.0  # decay per step of an average of the weights, which is evaluated and saved; 0: none
    sample_every: int = 500  # steps; 0: never
    sample_prompt: str = "\n"
    save_minutes: float = 5.0  # between checkpoints
    save_every: int = 0  # also save a checkpoint every so many steps; 0: no
    keep: int = 2  # number of checkpoints to keep
    wandb: str = ""  # a project to log to; needs the package wandb

    def check(self) -> None:
        _positive("run", self, "batch", "accumulate", "sequence_parallel", "log_every", "keep", "save_minutes")
        for name in ("steps", "epochs", "eval_every", "sample_every", "save_every", "eval_rows"):
            if getattr(self, name) < 0:
                raise InputError(f"run.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"run.ema must be in [0, 1), got {self.ema}")
        if self.seed < 0:
            raise InputError(f"run.seed must not be negative, got {self.seed}")
        if self.precision not in PRECISIONS:
            raise InputError(f"run.precision is {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if self.shard not in SHARDS:
            raise InputError(f"run.shard is {self.shard!r}; known: {', '.join(SHARDS)}")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
    vision: VisionSection = field(default_factory=VisionSection)

    def check(self) -> Config:
        """Returns the configuration itself; InputError if a value is impossible or does not fit another."""
        for section in dataclasses.fields(self):
            getattr(self, section.name).check()
        pieces, length = self.run.sequence_parallel, self.data.ctx_len
        if length % pieces:
            raise InputError(f"data.ctx_len is {length}, not a multiple of run.sequence_parallel = {pieces}")
        if self.model.is_vision and (pieces > 1 or self.run.shard != "none"):
            raise InputError(f"run.sequence_parallel and run.shard do not work with {self.model.generation}")
        if not self.model.is_vision and self.vision != VisionSection():
            raise InputError(f"the section vision is only for {', '.join(VISION_MODELS)}, not {self.model.generation}")
        if self.run.ema and (self.run.shard != "none" or self.model.tune != "all"):
            raise InputError("run.ema does not work with run.shard or model.tune")
        if self.run.shard != "none" and self.model.tune in ("lora", "dora"):
            raise InputError(
                f"run.shard does not work with model.tune={self.model.tune}: adapters are too small to shard"
            )
        if self.run.shard != "none" and self.optim.muon:
            raise InputError("optim.muon does not work with run.shard: it needs whole matrices")
        if self.run.compile and pieces > 1:
            raise InputError("run.compile does not work with run.sequence_parallel")
        if self.run.compile and not self.model.is_vision and self.data.order in ("documents", "carried"):
            raise InputError(
                "run.compile needs windows, like data.order=shuffle: packed documents recompile every step"
            )
        return self


def read_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Args:
        file: TOML; None: all defaults.
        overrides: "section.key=value", which take precedence.

    Raises:
        InputError: the file cannot be read, or a setting is unknown or impossible.
    """
    values: dict[str, Any] = {}
    if file is not None:
        path = Path(file).expanduser()
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not TOML ({error})") from error
    for override in overrides:
        name, equals, value = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"{override!r} is not a setting; write section.key=value, like optim.lr=1e-3")
        values.setdefault(section, {})[key] = _parse_value(value.strip())
    try:
        return from_dict(values).check()
    except InputError as error:
        raise InputError(f"{file}: {error}" if file is not None else str(error)) from None


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of dataclasses.asdict, from values that TOML and JSON can express; unknown keys are refused."""
    section_types = typing.get_type_hints(Config)
    sections = {}
    for name, settings in values.items():
        if name not in section_types or not isinstance(settings, Mapping):
            raise unknown_name("section", name, section_types)
        types_by_key = typing.get_type_hints(section_types[name])
        for key in settings:
            if key not in types_by_key:
                raise unknown_name(f"{name} setting", key, types_by_key)
        arguments = {key: _convert(f"{name}.{key}", types_by_key[key], x) for key, x in settings.items()}
        sections[name] = section_types[name](**arguments)
    return Config(**sections)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """The value as an instance of the annotated type; InputError if it is of another type."""
    if isinstance(kind, types.GenericAlias):  # a tuple of fixed length, or of any number of strings
        parts = typing.get_args(kind)
        if parts[-1] is ...:
            if not isinstance(value, list | tuple):
                raise InputError(f"{name} must be a list of strings, got {value!r}")
            parts = parts[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise InputError(f"{name} must be {len(parts)} numbers, got {value!r}")
        return tuple(_convert(name, part, x) for part, x in zip(parts, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
        raise InputError(f"{name} must be {expected}, got {value!r}")
    return value


def _parse_value(text: str) -> Any:
    """A TOML value; anything else is a string, for which quotes are optional here."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _positive(name: str, section: Any, *keys: str) -> None:
    """InputError unless the values of these keys are positive."""
    for key in keys:
        if not getattr(section, key) > 0:
            raise InputError(f"{name}.{key} must be positive, got {getattr(section, key)}")
