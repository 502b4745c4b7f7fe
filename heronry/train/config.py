"""The configuration of a run: a TOML file with five sections, in which every value has a default that works.

Unknown keys, values of the wrong type and impossible values are refused, in one line, before anything else happens.
What `heronry train --help` says of a setting stands beside it here, so this module imports no PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError, show, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERATIONS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")
VISION_GENERATIONS = ("vrwkv", "vrwkv6")
ORDERS = ("documents", "carried", "shuffle", "magic_prime", "random", "sequential")


@dataclass(frozen=True)
class Limits:
    """Which numbers a setting may be: text for "must ...", and the same as a function."""

    text: str
    allow: Callable[[float], bool]


POSITIVE = Limits("be positive", lambda x: x > 0)
NOT_NEGATIVE = Limits("not be negative", lambda x: x >= 0)
MIXTURE_EXAMPLE = """'data.train=[{path="a", weight=3}, {path="b", weight=1}]'"""
FRACTION = Limits("be in [0, 1)", lambda x: 0 <= x < 1)


def between(low: int, high: int) -> Limits:
    """Both included."""
    return Limits(f"be from {low:,} to {high:,}", lambda x: low <= x <= high)


def setting(default: Any, help: str, limits: Limits | None = None, known: Sequence[str] = ()) -> Any:
    """A field of a section.

    Args:
        help: a few words for `heronry train --help`.
        limits: of the number, or of each number of several.
        known: the names that it can be, besides its default.
    """
    return field(default=default, metadata={"help": help, "limits": limits, "known": known})


DEFAULT_ALPHA = 32


@dataclass(frozen=True)
class ModelSection:
    """The model."""

    path: str = setting("", "a checkpoint to start from, or bundled; without it a new model of the sizes below")
    tune: str = setting(
        "all",
        "what is trained: all weights; or, for a frozen model at `path`, its initial state (state) or adapters beside "
        "its matrices (lora, dora, miss)",
        known=("all", "state", "lora", "dora", "miss"),
    )
    rank: int = setting(16, "of adapters", POSITIVE)
    alpha: int = setting(DEFAULT_ALPHA, "the output of LoRA and DoRA is scaled by alpha / rank", POSITIVE)
    miss_variant: str = setting("default", "of MiSS: default, mini or bat", known=("default", "mini", "bat"))
    mini_r: int = setting(1, "with miss_variant=mini: outputs that have numbers of their own", POSITIVE)
    dropout: float = setting(0.0, "of the input of adapters", FRACTION)
    targets: tuple[str, ...] = setting(
        (), 'matrices that get adapters, like ["att.key", "value"]; without it all but the head'
    )
    quantize: str = setting(
        "", "with tune=lora or miss: packs the frozen matrices, int8 or int4", known=("int8", "int4")
    )
    generation: str = setting(
        "rwkv7", "rwkv4 to rwkv7; vrwkv and vrwkv6 classify images", known=(*GENERATIONS, *VISION_GENERATIONS)
    )
    n_layer: int = setting(12, "blocks", POSITIVE)
    n_embd: int = setting(768, "channels", POSITIVE)
    vocab_size: int = setting(0, "0: that of the data, up to the next multiple of 64", NOT_NEGATIVE)

    @property
    def is_vision(self) -> bool:
        """Whether it classifies images."""
        return self.generation in VISION_GENERATIONS

    def check(self) -> None:
        if self.is_vision and (self.tune != "all" or self.quantize):
            raise InputError(f"model.tune={self.tune} and model.quantize do not work with {self.generation}")
        if self.tune != "all" and not self.path:
            raise InputError(f"model.tune={self.tune} needs model.path, the model to tune")
        if self.quantize and self.tune not in ("lora", "miss"):
            raise InputError(f"model.quantize needs model.tune=lora or miss, got {self.tune}")
        if self.tune == "miss" and self.alpha != DEFAULT_ALPHA:
            raise InputError("model.alpha is for lora and dora: MiSS has no scale")
        if self.tune != "miss" and self.miss_variant != "default":
            raise InputError(f"model.miss_variant needs model.tune=miss, got {self.tune}")
        if self.miss_variant != "mini" and self.mini_r != 1:
            raise InputError(f"model.mini_r needs model.miss_variant=mini, got {self.miss_variant}")
        if self.miss_variant == "bat" and self.dropout:
            raise InputError("model.dropout does not work with model.miss_variant=bat, which changes the matrix itself")


@dataclass(frozen=True)
class WeightedSource:
    """A token file of a mixture, and its share of the tokens that are read, in proportion to the other weights."""

    path: str
    weight: float


@dataclass(frozen=True)
class DataSection:
    """The data and how they are read."""

    train: str | tuple[WeightedSource, ...] = setting(
        "",
        "a token file from `heronry data` or a binidx pair, or a mixture, like "
        '[{path="a", weight=3}, {path="b", weight=1}]; for images a folder, .parquet or hf://NAME[:SPLIT]',
    )
    eval: str = setting("", "another one, for evaluation")
    order: str = setting(
        "documents",
        "documents: shuffled, isolated from each other; carried: the same, with the state carried from row to row; or "
        "windows over everything: shuffle, magic_prime, random, sequential",
        known=ORDERS,
    )
    ctx_len: int = setting(1024, "tokens per row", POSITIVE)
    tbptt_chunks: int = setting(
        1, "with carried: consecutive rows of a lane per step, with gradients through their states", POSITIVE
    )

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """The token files of `train`."""
        return (WeightedSource(self.train, 1.0),) if isinstance(self.train, str) else self.train

    @property
    def name(self) -> str:
        """`train` in a message."""
        return ", ".join(source.path for source in self.sources)

    def check(self) -> None:
        if not self.train:
            raise InputError("data.train is missing: a token file (see `heronry data --help`), or a folder of images")
        if isinstance(self.train, str):
            if self.train.startswith("[") and "path" in self.train:  # the shell has eaten the quotes
                raise InputError(f"data.train is no list of TOML: {show(self.train)}; write it as {MIXTURE_EXAMPLE}")
        else:
            self._check_mixture(self.train)
        if self.tbptt_chunks > 1 and self.order != "carried":
            raise InputError(f"data.tbptt_chunks needs data.order=carried, got {self.order}")

    def _check_mixture(self, sources: tuple[WeightedSource, ...]) -> None:
        paths = [source.path for source in sources]
        for source in sources:
            if not source.path:
                raise InputError("data.train: a path is empty")
            if paths.count(source.path) > 1:
                raise InputError(f"data.train: {source.path} is there twice; add up its weights")
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise InputError(f"data.train: the weight of {source.path} must be positive, got {source.weight}")


@dataclass(frozen=True)
class OptimSection:
    """The optimizer and the learning rate."""

    lr: float = setting(6e-4, "learning rate after the warm-up", POSITIVE)
    lr_final: float = setting(6e-5, "at the end of the run, after half a cosine", NOT_NEGATIVE)
    warmup: int = setting(10, "steps", NOT_NEGATIVE)
    muon: bool = setting(
        False, "train the matrices inside the blocks by Muon instead of AdamW, at the same learning rate"
    )
    weight_decay: float = setting(0.1, "of matrices; see param_groups in the model's file", NOT_NEGATIVE)
    betas: tuple[float, float] = setting((0.9, 0.99), "of Adam", FRACTION)
    eps: float = setting(1e-18, "of Adam", POSITIVE)
    clip: float = setting(1.0, "maximum norm of the gradients; 0: no clipping", NOT_NEGATIVE)
    l2wrap: float = setting(1e-4, "pulls the largest logit of every position towards 0", NOT_NEGATIVE)

    def check(self) -> None:
        """Nothing here depends on anything else."""


@dataclass(frozen=True)
class RunSection:
    """How long and where to train, and what is saved and logged."""

    out: str = setting("out", "the folder for the model, its checkpoints and the log")
    device: str = setting("auto", "cpu, cuda or cuda:1; auto: a GPU if there is one")
    batch: int = setting(
        8, "rows per forward pass of a process (or of a group of them: see sequence_parallel)", POSITIVE
    )
    accumulate: int = setting(1, "such passes per step", between(1, 1_000_000))
    sequence_parallel: int = setting(1, "this many processes share each row, a piece of its tokens each", POSITIVE)
    steps: int = setting(0, "length of the run; 0: see epochs", NOT_NEGATIVE)
    epochs: float = setting(1.0, "passes over the data, if steps is 0", between(0, 1_000_000))
    precision: str = setting(
        "auto",
        "of the activations: bfloat16 (autocast), float32, float64 (for tests); auto: bfloat16 where it is fast",
        known=("auto", "bfloat16", "float32", "float64"),
    )
    checkpointing: bool = setting(False, "store only the activations between blocks and recompute the others")
    compile: bool = setting(False, "torch.compile the model")
    shard: str = setting(
        "none",
        "what is sharded over several processes: none; gradients: these, the optimizer state and, between passes, the "
        "weights; full: the weights during a pass too, except for the current block",
        known=("none", "gradients", "full"),
    )
    seed: int = setting(0, "of all random numbers", Limits("be from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64))
    log_every: int = setting(10, "steps", POSITIVE)
    eval_every: int = setting(500, "steps; 0: only at the end", NOT_NEGATIVE)
    eval_rows: int = setting(0, "rows to evaluate; 0: 64 rows of tokens, or all images", NOT_NEGATIVE)
    ema: float = setting(
        0.0, "decay per step of an average of the weights, which is evaluated and saved; 0: none", FRACTION
    )
    sample_every: int = setting(500, "steps; 0: never", NOT_NEGATIVE)
    sample_prompt: str = setting("\n", "what samples go on from")
    save_minutes: float = setting(5.0, "between checkpoints", POSITIVE)
    save_every: int = setting(0, "also save a checkpoint every so many steps; 0: no", NOT_NEGATIVE)
    keep: int = setting(2, "number of checkpoints to keep", POSITIVE)
    wandb: str = setting("", "a project to log to; needs the package wandb")

    def check(self) -> None:
        if not self.steps and not self.epochs:
            raise InputError("run.steps and run.epochs are both 0, so there is nothing to do")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"run.device is {self.device!r}; known: auto, cpu, cuda, cuda:0, cuda:1, ...")


@dataclass(frozen=True)
class VisionSection:
    """For image classification."""

    size: int = setting(224, "of the images, in pixels", POSITIVE)
    patch_size: int = setting(16, "in pixels", POSITIVE)
    post_norm: bool = setting(False, "norms behind attention and MLP, as in the large models")
    init_values: float = setting(0.0, "of the layer scale; 0: none", NOT_NEGATIVE)
    drop_path: float = setting(0.0, "in the last layer; the first has 0", FRACTION)
    decay_lr: float = setting(
        1.0, "learning rate of the decays, as a multiple of optim.lr; short runs need a higher one", POSITIVE
    )
    shift: str = setting("q", "how patches see their neighbors", known=("q", "previous", "none"))
    causal: bool = setting(False, "with vrwkv: attention to earlier patches only")
    crop: tuple[float, float] = setting(
        (0.08, 1.0), "smallest and largest fraction of the area to crop; [1.0, 1.0]: no crop"
    )
    flip: bool = setting(True, "half of the images")
    rand_augment: int = setting(
        9,
        "magnitude, from 0 to 30, of two random augmentations per image; 0: none",
        between(0, 30),
    )
    erasing: float = setting(0.25, "probability that a rectangle of an image is erased", FRACTION)
    mixup: float = setting(
        0.0, "alpha of Beta(alpha, alpha); with cutmix as well, each batch gets one of the two", NOT_NEGATIVE
    )
    cutmix: float = setting(0.0, "as mixup", NOT_NEGATIVE)
    label_smoothing: float = setting(0.1, "probability that is spread over all classes", FRACTION)
    workers: int = setting(
        -1,
        "threads that read images; -1: as many as there are cores to spare, up to 8",
        Limits("be -1 or more", lambda x: x >= -1),
    )

    def check(self) -> None:
        if self.size % self.patch_size:
            raise InputError(f"vision.size is {self.size}, not a multiple of vision.patch_size = {self.patch_size}")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"vision.crop must be two ascending fractions in (0, 1], got {list(self.crop)}")


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
            values = getattr(self, section.name)
            for key in dataclasses.fields(values):
                _check_value(f"{section.name}.{key.name}", getattr(values, key.name), key)
            values.check()
        pieces, length = self.run.sequence_parallel, self.data.ctx_len
        if length % pieces:
            raise InputError(f"data.ctx_len is {length}, not a multiple of run.sequence_parallel = {pieces}")
        if self.model.is_vision and not isinstance(self.data.train, str):
            raise InputError(f"data.train must be one folder or data set of images for {self.model.generation}")
        if self.model.is_vision and (pieces > 1 or self.run.shard != "none"):
            raise InputError(f"run.sequence_parallel and run.shard do not work with {self.model.generation}")
        if not self.model.is_vision and self.vision != VisionSection():
            raise InputError(
                f"the section vision is only for {', '.join(VISION_GENERATIONS)}, not {self.model.generation}"
            )
        if self.run.ema and (self.run.shard != "none" or self.model.tune != "all"):
            raise InputError("run.ema does not work with run.shard or model.tune")
        if self.run.shard != "none" and self.model.tune in ("lora", "dora", "miss"):
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
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows put a mark in front
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: cannot be read ({reason})") from error
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"{path}: not TOML ({error})") from error
    kinds = _setting_types()
    for override in overrides:
        name, equals, value = override.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise InputError(f"{override!r} is not a setting; write section.key=value, like optim.lr=1e-3")
        settings = values.setdefault(section, {})
        if isinstance(settings, dict):  # what is no section is refused below
            settings[key] = _parse_value(value.strip(), kinds.get(name.strip()))
    try:
        return from_dict(values).check()
    except InputError as error:
        raise InputError(f"{file}: {error}" if file is not None else str(error)) from None


def parse_arguments(arguments: Sequence[str]) -> Config:
    """`read_config` of the words of a command line: `[FILE] [SECTION.KEY=VALUE]...`

    Raises:
        InputError: see `read_config`.
    """
    first = arguments[0] if arguments else ""
    if Path(first).expanduser().is_file():
        return read_config(first, arguments[1:])
    if not first or "=" in first:
        return read_config(None, arguments)
    names = _setting_types()
    if first in names:
        raise InputError(f"{first} has no value; write {first}=VALUE")
    close = get_close_matches(first, names, n=1)
    hint = f"; a setting is written {close[0]}=VALUE" if close else ""
    raise InputError(f"{first}: no such file{hint}")


def describe_settings(width: int = 100) -> str:
    """Every setting with its default and what it means, a paragraph a section, in lines of `width`."""
    paragraphs = []
    for name, cls in typing.get_type_hints(Config).items():
        lines = textwrap.wrap(f"[{name}] {cls.__doc__}", width, subsequent_indent="  ")
        for key in dataclasses.fields(cls):
            default = list(key.default) if isinstance(key.default, tuple) else key.default
            start = f"  {key.name} = {json.dumps(default)}"
            text = f"{start:30}  {key.metadata['help']}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 32, break_on_hyphens=False)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def setting_names() -> list[str]:
    """All settings, as "section.key"."""
    return list(_setting_types())


def _setting_types() -> dict[str, Any]:
    """The type of each setting, by "section.key"."""
    sections = typing.get_type_hints(Config)
    return {f"{name}.{key}": kind for name, cls in sections.items() for key, kind in typing.get_type_hints(cls).items()}


def from_dict(values: Mapping[str, Any]) -> Config:
    """The inverse of dataclasses.asdict, from values that TOML and JSON can express; unknown keys are refused."""
    section_types = typing.get_type_hints(Config)
    sections = {}
    for name, settings in values.items():
        if name not in section_types:
            raise unknown_name("section", name, section_types)
        if not isinstance(settings, Mapping):
            raise InputError(
                f"{name} is a section, not a value: write [{name}] and its settings below, or {name}.KEY = ..."
            )
        types_by_key = typing.get_type_hints(section_types[name])
        for key in settings:
            if key not in types_by_key:
                raise unknown_name(f"{name} setting", key, types_by_key)
        arguments = {key: _convert(f"{name}.{key}", types_by_key[key], x) for key, x in settings.items()}
        sections[name] = section_types[name](**arguments)
    return Config(**sections)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """The value as an instance of the annotated type; InputError if it is of another type."""
    if isinstance(kind, types.UnionType):
        return value if isinstance(value, str) else _convert_mixture(name, value)
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
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[kind]
        raise InputError(f"{name} must be {expected}, got {show(value)}")
    return value


def _convert_mixture(name: str, value: Any) -> tuple[WeightedSource, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} must be a string or a list of tables, got {show(value)}")
    sources = []
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise InputError(f"{name}[{i}] must be a table, {{path = ..., weight = ...}}, got {show(item)}")
        kinds = typing.get_type_hints(WeightedSource)
        for key in item:
            if key not in kinds:
                raise unknown_name(f"{name} setting", key, kinds)
        for key in kinds:
            if key not in item:
                raise InputError(f"{name}[{i}] has no {key}")
        sources.append(WeightedSource(**{key: _convert(f"{name}[{i}].{key}", kinds[key], item[key]) for key in kinds}))
    return tuple(sources)


def _check_value(name: str, value: Any, key: dataclasses.Field[Any]) -> None:
    """InputError for a value that the metadata of its field do not allow; nan and inf are never allowed."""
    known, limits = key.metadata["known"], key.metadata["limits"]
    if known and value not in known and value != key.default:
        raise InputError(f"{name} is {show(value)}; known: {', '.join(known)}")
    for number in value if isinstance(value, tuple) else (value,):
        shown = list(value) if isinstance(value, tuple) else value
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{name} must be finite, got {shown}")
        if limits is not None and not limits.allow(number):
            raise InputError(f"{name} must {limits.text}, got {shown}")


def _parse_value(text: str, kind: Any) -> Any:
    """A TOML value; anything else is a string, for which quotes are optional here, and so is everything without them
    where a string is wanted: a file may be called 1984. kind: the type of the setting, if it is known."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    allowed = {str: str, str | tuple[WeightedSource, ...]: str | list}.get(kind, object)
    return value if isinstance(value, allowed) else text
