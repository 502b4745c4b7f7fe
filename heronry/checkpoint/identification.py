"""Which model the tensors of a checkpoint are: its class and its sizes, read from their names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypeVar

from ..errors import InputError, show
from ..formats.lazy_tensor import Tensors, same_numbers
from ..formats.prefixes import strip_prefixes
from ..models import MODELS, VISION_MODELS, Network, detect
from .notes import NOTES, check_note
from .packed_layout import logical_shapes

M = TypeVar("M", bound=Network)

NAMES = [*MODELS, *VISION_MODELS]  # of models, as "model" in a config.json
QUANTIZATION_KEYS = ("quantization", "fingerprint")  # in the config.json of a quantized model; whose states fit it


def identify(
    tensors: Tensors, config: Mapping[str, Any] | None, ln_x_eps: float | None = None
) -> tuple[type[Network], Any]:
    """The class of the model that these tensors are, all of them, and its configuration.

    Prefixes of wrappers, and tensors that the class never reads, are removed from `tensors`. Quantized matrices count
    with the shapes they represent.

    Args:
        tensors: under BlinkDL's names.
        config: of the checkpoint; it must agree with the tensors.
        ln_x_eps: as for `load`.

    Raises:
        InputError: they make no model, or not the one that `config` describes.
    """
    config = config or {}
    if config and config.get("model") not in NAMES:
        raise InputError(f'config.json: "model" must be one of {", ".join(NAMES)}')
    plain = strip_prefixes(tensors)
    tensors.clear()
    tensors.update(plain)
    cls = detect({key: x.shape for key, x in tensors.items()})
    for key in cls.ignored_keys:
        tensors.pop(key, None)
    shapes = logical_shapes(tensors, config.get("quantization"))
    model_config = _read_config(cls, shapes, config, ln_x_eps)
    _check_complete(on_meta(cls, model_config).state_dict(), shapes)
    return cls, model_config


def on_meta(cls: type[M], model_config: Any) -> M:
    """A model without weights, which takes no memory."""
    with torch.device("meta"):
        return cls(model_config)


def _read_config(
    cls: type[Network], shapes: Mapping[str, torch.Size], config: Mapping[str, Any], ln_x_eps: float | None
) -> Any:
    """The configuration that the shapes show, checked against the config of the checkpoint."""
    try:
        model_config = cls.Config.from_shapes(shapes)
    except KeyError as error:
        raise InputError(f"{error.args[0]} is missing, so this is not a complete {cls.name} checkpoint") from error
    except (IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its tensors do not have the shapes of an {cls.name} checkpoint ({error})") from error
    from_tensors = {"model": cls.name, **asdict(model_config)}
    for key, value in config.items():
        if key in QUANTIZATION_KEYS:
            continue
        if key in NOTES:
            check_note(key, value)
            continue
        if key not in from_tensors:
            raise InputError(
                f"config.json has an unknown key {show(key)}; the keys of {cls.name} are {', '.join(from_tensors)}"
            )
        if key not in cls.config_only and value != from_tensors[key]:
            raise InputError(f"config.json says {key} = {show(value)}, but the tensors say {from_tensors[key]!r}")
    settings = {key: config[key] for key in cls.config_only if key in config}
    if ln_x_eps is not None:
        settings["ln_x_eps"] = ln_x_eps
    if "ln_x_eps" in settings:
        settings["ln_x_eps"] = _check_ln_x_eps(cls, settings["ln_x_eps"], "ln_x_eps" in from_tensors)
    if not isinstance(settings.get("ln0_folded", False), bool):
        raise InputError(f"config.json: ln0_folded must be true or false, got {show(settings['ln0_folded'])}")
    try:
        return replace(model_config, **settings)
    except TypeError as error:
        raise InputError(f"config.json has a setting of the wrong type ({error})") from error


def _check_ln_x_eps(cls: type[Network], epsilon: Any, has_norm: bool) -> float:
    if not has_norm:
        raise InputError(f"{cls.name} has no norm after its recurrence, so ln_x_eps does not apply")
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
        raise InputError(f"ln_x_eps must be a positive number like 64e-5, got {show(epsilon)}")
    return float(epsilon)


def _check_complete(expected: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """InputError unless the tensors are those of the model, up to dimensions of size 1 and flattened vectors."""
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected]
    wrong = [
        f"{key} {list(shapes[key])} instead of {list(x.shape)}"
        for key, x in expected.items()
        if key in shapes and not same_numbers(shapes[key], x.shape)
    ]
    problems = [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if names
    ]
    if problems:
        raise InputError("the tensors do not make a model; " + "; ".join(problems))
