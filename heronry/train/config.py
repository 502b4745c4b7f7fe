"""What a run is told: a TOML file of five sections, every value with a default that works.

An unknown key, a value of another type or one that cannot be is named in one line before anything else happens.
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

from ..errors import InputError
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
    path: str = ""  # a checkpoint to go on from; without it a new model of the sizes below
    # what is trained: all weights, or of a frozen model at `path` its initial state ("state") or adapters beside its
    # matrices ("lora", "dora")
    tune: str = "all"
    rank: int = 16  # of adapters
    alpha: int = 32  # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0  # of what adapters read
    targets: tuple[str, ...] = ()  # matrices that get adapters, like ["att.key", "value"]; without: all but the head
    quantize: str = ""  # with "lora": packs the frozen matrices, int8 or int4
    generation: str = "rwkv7"
    n_layer: int = 12
    n_embd: int = 768
    vocab_size: int = 0  # 0: the data's vocabulary, up to the next multiple of 64

    @property
    def is_vision(self) -> bool:
        """Whether it is of pictures."""
        return self.generation in VISION_MODELS

    def check(self) -> None:
        if self.generation not in (known := [*MODELS, *VISION_MODELS]):
            raise InputError(f"model.generation is {self.generation!r}; known are {', '.join(known)}")
        if self.is_vision and (self.tune != "all" or self.quantize):
            raise InputError(f"model.tune={self.tune} and model.quantize are not for {self.generation}")
        if self.tune not in TUNED:
            raise InputError(f"model.tune is {self.tune!r}; known are {', '.join(TUNED)}")
        if self.tune != "all" and not self.path:
            what = "whose initial state is tuned" if self.tune == "state" else "that gets adapters"
            raise InputError(f"model.tune={self.tune} needs model.path: the model {what}")
        if self.quantize and self.tune != "lora":
            raise InputError(f"model.quantize is for model.tune=lora, not {self.tune}")
        if self.quantize and self.quantize not in FORMATS:
            raise InputError(f"model.quantize is {self.quantize!r}; known are {', '.join(FORMATS)}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        _positive("model", self, "n_layer", "n_embd", "rank", "alpha")


@dataclass(frozen=True)
class DataSection:
    train: str = ""  # a token file that `heronry data` wrote, or a binidx pair
    eval: str = ""  # another one, only measured
    # shuffled documents without leaks; "carried" with the state from row to row; or windows: shuffle, magic_prime,
    # random, sequential
    order: str = "documents"
    ctx_len: int = 1024  # tokens of a row
    tbptt_chunks: int = 1  # with "carried": rows of a lane in a step, through whose states gradients flow

    def check(self) -> None:
        if not self.train:
            raise InputError(
                "data.train is missing: the token file to learn from (see `heronry data --help`), or pictures"
            )
        if self.order not in ORDERS:
            raise InputError(f"data.order is {self.order!r}; known are {', '.join(ORDERS)}")
        _positive("data", self, "ctx_len", "tbptt_chunks")
        if self.tbptt_chunks > 1 and self.order != "carried":
            raise InputError(f"data.tbptt_chunks is for data.order=carried, not {self.order}")


@dataclass(frozen=True)
class VisionSection:
    """Of models of pictures, whose data.train and data.eval are folders of one folder a class, .parquet files or
    hf://NAME[:SPLIT]."""

    size: int = 224  # of the pictures, in pixels
    patch_size: int = 16
    post_norm: bool = False
    init_values: float = 0.0  # of the gammas; 0: there are none
    drop_path: float = 0.0  # of the last layer, the first has 0
    decay_lr: float = 1.0  # the decays' rate as a multiple of optim.lr; a short run wants more, patches divide them
    shift: str = "q"
    causal: bool = False
    crop: tuple[float, float] = (0.08, 1.0)  # shares of a picture's area that are cut out; 1.0, 1.0: no crop
    flip: bool = True
    rand_augment: int = 9  # magnitude, of 0 to 30, of two random changes a picture; 0: none
    erasing: float = 0.25  # how many of the pictures lose a rectangle
    mixup: float = 0.0  # of Beta(x, x); with cutmix too, each batch has one or the other
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    workers: int = -1  # processes that read pictures; -1: as many as there are cores to spare, up to 8

    def check(self) -> None:
        _positive("vision", self, "size", "patch_size", "decay_lr")
        if self.size % self.patch_size:
            raise InputError(f"vision.size is {self.size}, which patches of {self.patch_size} do not divide")
        if self.shift not in SHIFTS:
            raise InputError(f"vision.shift is {self.shift!r}; known are {', '.join(SHIFTS)}")
        for name in ("drop_path", "erasing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"vision.{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("init_values", "mixup", "cutmix", "rand_augment"):
            if getattr(self, name) < 0:
                raise InputError(f"vision.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"vision.crop must be two shares in (0, 1], got {list(self.crop)}")


@dataclass(frozen=True)
class OptimSection:
    lr: float = 6e-4  # at the end of the warm-up
    lr_final: float = 6e-5  # at the end of the run, after half a cosine
    warmup: int = 10  # steps
    muon: bool = False  # the matrices inside the blocks by Muon instead of AdamW, at the same rate
    weight_decay: float = 0.1  # of matrices only; the model's file says which
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-18
    clip: float = 1.0  # the largest norm of all gradients together; 0: none
    l2wrap: float = 1e-4  # pulls the largest logit of every position towards 0

    def check(self) -> None:
        _positive("optim", self, "lr", "eps")
        for name in ("lr_final", "warmup", "weight_decay", "clip", "l2wrap"):
            if getattr(self, name) < 0:
                raise InputError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optim.betas must lie in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class RunSection:
    out: str = "out"  # the folder for the model, its checkpoints and the log
    batch: int = 8  # rows in one forward pass of one process (of one group: see sequence_parallel)
    accumulate: int = 1  # such passes in a step
    sequence_parallel: int = 1  # so many processes share each row, a piece of its tokens each; their batch is one
    steps: int = 0  # how long: so many steps, or
    epochs: float = 1.0  # so many times through the data, where steps is 0
    # of the activations: bfloat16 (autocast), float32, float64 (for tests), or auto: bfloat16 where that is fast
    precision: str = "auto"
    checkpointing: bool = False  # keep the activations between blocks only and compute the rest twice
    compile: bool = False  # torch.compile the model
    # what each of several processes holds a piece of: nothing; gradients and the optimiser's state, and the weights
    # from pass to pass ("gradients"); or the weights in a pass too, but for the block that computes ("full")
    shard: str = "none"
    seed: int = 0
    log_every: int = 10  # steps
    eval_every: int = 500  # steps; 0: at the end only
    eval_rows: int = 0  # 0: 64 of texts, all pictures
    ema: float = 0.0  # the mean of the weights, of which so much stays at every step, is measured and kept; 0: none
    sample_every: int = 500  # steps; 0: never
    sample_prompt: str = "\n"
    save_minutes: float = 5.0  # between checkpoints
    save_every: int = 0  # steps between checkpoints, besides
    keep: int = 2  # checkpoints that stay
    wandb: str = ""  # a project to log to, where wandb is installed

    def check(self) -> None:
        _positive("run", self, "batch", "accumulate", "sequence_parallel", "log_every", "keep", "save_minutes")
        for name in ("steps", "epochs", "eval_every", "sample_every", "save_every", "eval_rows"):
            if getattr(self, name) < 0:
                raise InputError(f"run.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"run.ema must lie in [0, 1), got {self.ema}")
        if self.seed < 0:
            raise InputError(f"run.seed must not be negative, got {self.seed}")
        if self.precision not in PRECISIONS:
            raise InputError(f"run.precision is {self.precision!r}; known are {', '.join(PRECISIONS)}")
        if self.shard not in SHARDS:
            raise InputError(f"run.shard is {self.shard!r}; known are {', '.join(SHARDS)}")


@dataclass(frozen=True)
class Config:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
    vision: VisionSection = field(default_factory=VisionSection)

    def check(self) -> Config:
        """Itself; InputError if a value cannot be."""
        for section in dataclasses.fields(self):
            getattr(self, section.name).check()
        pieces, length = self.run.sequence_parallel, self.data.ctx_len
        if length % pieces:
            raise InputError(f"data.ctx_len is {length}, which run.sequence_parallel = {pieces} does not divide")
        if self.model.is_vision and (pieces > 1 or self.run.shard != "none"):
            raise InputError(f"run.sequence_parallel and run.shard are not for {self.model.generation}")
        if not self.model.is_vision and self.vision != VisionSection():
            raise InputError(f"the section vision is for {', '.join(VISION_MODELS)}, not {self.model.generation}")
        if self.run.ema and (self.run.shard != "none" or self.model.tune != "all"):
            raise InputError("run.ema is for whole models: not with run.shard or model.tune")
        if self.run.shard != "none" and self.model.tune in ("lora", "dora"):
            raise InputError(f"run.shard is not for model.tune={self.model.tune}: adapters are small, and stay whole")
        if self.run.shard != "none" and self.optim.muon:
            raise InputError("optim.muon needs whole matrices: not with run.shard")
        if self.run.compile and pieces > 1:
            raise InputError("run.compile does not reach over processes: not with run.sequence_parallel")
        if self.run.compile and not self.model.is_vision and self.data.order in ("documents", "carried"):
            raise InputError("run.compile needs windows (data.order=shuffle): packed documents compile anew every step")
        return self


def read_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a TOML file, with `section.key=value` on top."""
    told: dict[str, Any] = {}
    if file is not None:
        path = Path(file).expanduser()
        try:
            told = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not TOML ({error})") from error
    for override in overrides:
        name, equals, value = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"{override!r} is no setting; write section.key=value, like optim.lr=1e-3")
        told.setdefault(section, {})[key] = _value(value.strip())
    try:
        return from_dict(told).check()
    except InputError as error:
        raise InputError(f"{file}: {error}" if file is not None else str(error)) from None


def from_dict(told: Mapping[str, Any]) -> Config:
    """The inverse of dataclasses.asdict, for what TOML and JSON can say; unknown keys are refused."""
    sections = typing.get_type_hints(Config)
    made = {}
    for name, values in told.items():
        if name not in sections or not isinstance(values, Mapping):
            raise InputError(f"there is no section {name!r}; known are {', '.join(sections)}")
        kinds = typing.get_type_hints(sections[name])
        for key in values:
            if key not in kinds:
                raise InputError(f"there is no {name}.{key}; known are {', '.join(kinds)}")
        made[name] = sections[name](**{key: _typed(f"{name}.{key}", kinds[key], x) for key, x in values.items()})
    return Config(**made)


def _typed(name: str, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.GenericAlias):  # a tuple of numbers, or of any number of texts
        parts = typing.get_args(kind)
        if parts[-1] is ...:
            if not isinstance(value, list | tuple):
                raise InputError(f"{name} must be a list of texts, got {value!r}")
            parts = parts[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise InputError(f"{name} must be {len(parts)} numbers, got {value!r}")
        return tuple(_typed(name, part, x) for part, x in zip(parts, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise InputError(f"{name} must be {what}, got {value!r}")
    return value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a text needs no quotes here


def _positive(section: str, of: Any, *names: str) -> None:
    for name in names:
        if not getattr(of, name) > 0:
            raise InputError(f"{section}.{name} must be positive, got {getattr(of, name)}")
