"""The published Vision-RWKVs by name, with new weights or those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ... import formats
from ...errors import InputError, unknown_name
from ...formats.lazy_tensor import LazyTensor, same_numbers
from .model import VisionModel
from .vrwkv import VRWKV, VRWKVConfig
from .vrwkv6 import VRWKV6, VRWKV6Config

SMALL, BASE = {"post_norm": True, "drop_path": 0.3}, {"post_norm": True, "init_values": 1e-5, "drop_path": 0.5}
LARGE = {"init_values": 1e-5, "drop_path": 0.1, "key_norm": True, "head_hidden": 3072, "image_size": 192}
VARIANTS: dict[str, VRWKVConfig | VRWKV6Config] = {
    "vrwkv_tiny": VRWKVConfig.sized(192, 12),
    "vrwkv_small": VRWKVConfig.sized(384, 12, **SMALL, init_values=1.0),
    "vrwkv_base": VRWKVConfig.sized(768, 12, **BASE),
    "vrwkv_large": VRWKVConfig.sized(1024, 24, post_norm=True, **LARGE),
    "vrwkv6_tiny": VRWKV6Config.sized(192, 12),
    "vrwkv6_small": VRWKV6Config.sized(384, 12, **SMALL, init_values=1e-5),
    "vrwkv6_base": VRWKV6Config.sized(768, 12, **BASE),
}


def create(
    name: str, pretrained: str | Path | None = None, num_classes: int | None = None, **changes: Any
) -> VisionModel:
    """A model by name, vrwkv_tiny to vrwkv_large and vrwkv6_tiny to vrwkv6_base, in training mode.

    Args:
        pretrained: a checkpoint as the authors published them, or one of ours; without it the weights are new.
        num_classes: a number other than the variant's (and the file's) 1000 gives it a new head; 0: no head.
        changes: of the configuration, like drop_path=0.1 or segments=32.

    Raises:
        InputError: an unknown name or setting, a file of another variant.
    """
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    variant = VARIANTS[name]
    known = {field.name for field in fields(variant)}
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise InputError(f"{name} has no setting {unknown[0]!r}")
    config = replace(variant, **changes)
    if pretrained is None:
        model = _kind(config)(config if num_classes is None else replace(config, num_classes=num_classes))
        model.init_weights()
        return model
    path = Path(pretrained).expanduser()
    try:
        tensors = formats.read(path).tensors
        shapes = {key: x.shape for key, x in tensors.items()}
        if "pos_embed" not in shapes:
            raise InputError(f"not a Vision-RWKV checkpoint (it holds {', '.join(list(shapes)[:3])}, ...)")
        kind = VRWKV6Config if "layers.0.att.time_maa_x" in shapes else VRWKVConfig
        try:
            read = kind.from_shapes(shapes)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"not a complete Vision-RWKV checkpoint: {error}") from error
        for key in ("n_embd", "n_layer", "dim_ffn", "patch_size", "key_norm", "head_size"):
            if kind is not type(config) or getattr(read, key, None) != getattr(config, key, None):
                raise InputError(f"holds {_describe(read)}, not {name}")
        sizes = {key: getattr(read, key) for key in ("image_size", "num_classes", "head_hidden", "final_norm")}
        model = _kind(config)(replace(config, **sizes))
        _fill(model, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if num_classes is not None and num_classes != read.num_classes:
        model.reset_classifier(num_classes)
    return model


def _fill(model: VisionModel, tensors: Mapping[str, LazyTensor]) -> None:
    """Copies all tensors into the model; InputError if one is missing, unexpected or of another shape."""
    weights = model.state_dict()
    missing = [key for key in weights if key not in tensors]
    unexpected = [key for key in tensors if key not in weights]
    wrong = [key for key, x in weights.items() if key in tensors and not same_numbers(tensors[key].shape, x.shape)]
    for what, names in (("is missing", missing), ("is not of this model", unexpected), ("has another shape", wrong)):
        if names:
            raise InputError(f"{names[0]} {what}")
    with torch.no_grad():
        for key, x in weights.items():
            x.copy_(tensors[key].read().reshape(x.shape))


def _kind(config: VRWKVConfig | VRWKV6Config) -> type[VisionModel]:
    return VRWKV6 if isinstance(config, VRWKV6Config) else VRWKV


def _describe(config: VRWKVConfig | VRWKV6Config) -> str:
    kind = "vrwkv6" if isinstance(config, VRWKV6Config) else "vrwkv"
    for name, variant in VARIANTS.items():
        if type(variant) is type(config) and (variant.n_embd, variant.n_layer) == (config.n_embd, config.n_layer):
            return name
    return f"a {kind} of {config.n_layer} layers and {config.n_embd} channels"
