"""Builds the model that a configuration names, ready for training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from ..checkpoint import load
from ..errors import InputError
from ..models import MODELS, VISION_MODELS, Model, VisionModel
from ..models.native_step import has_fast_matmul
from . import fsdp
from .config import Config


def resolve_precision(config: Config, device: torch.device) -> str:
    """The precision of the activations: "bfloat16", "float32" or "float64"."""
    if config.run.precision != "auto":
        return config.run.precision
    fast = device.type != "cpu" or has_fast_matmul(torch.bfloat16)
    return "bfloat16" if fast else "float32"


def build_model(config: Config, vocab_size: int, precision: str, device: str = "cpu") -> Model:
    """A language model, with its trained part prepared; on the "meta" device it has no weights.

    Args:
        vocab_size: of the data.
        precision: see `resolve_precision`.

    Raises:
        InputError: the model's vocabulary is smaller, or `model.path` cannot be loaded or trained as configured.
    """
    section = config.model
    if section.path:
        model = load(section.path, _weight_dtype(precision), device, quantize=section.quantize or None)
        if model.quantization is not None and section.tune != "lora":
            raise InputError(f"{section.path}: quantized weights cannot be trained, except with model.tune=lora")
        if section.tune == "state":
            model.tune_state()
        elif section.tune != "all":
            from ..adapters.inject import inject_adapter  # needs peft, which takes seconds to import

            dora = section.tune == "dora"
            inject_adapter(model, section.rank, section.alpha, section.dropout, dora, section.targets, section.path)
    else:
        cls = MODELS[section.generation]
        size = section.vocab_size or -(-vocab_size // 64) * 64
        with torch.device(device):
            model = cls(cls.Config.sized(size, section.n_layer, section.n_embd))
        if device != "meta":
            model.init_weights()
    return prepare_model(model, config, vocab_size, precision)


def build_vision_model(config: Config, n_classes: int, precision: str) -> VisionModel:
    """An image classifier; a loaded one with another number of classes gets a new head.

    Raises:
        InputError: `model.path` cannot be loaded or is of another generation.
    """
    section, vision = config.model, config.vision
    cls = VISION_MODELS[section.generation]
    dtype = _weight_dtype(precision)
    if section.path:
        loaded = load(section.path, dtype, kind=VisionModel)
        if not isinstance(loaded, cls):
            raise InputError(f"{section.path}: is a {loaded.name}, not a {section.generation}")
        model = cls(replace(loaded.config, drop_path=vision.drop_path, decay_lr=vision.decay_lr)).to(dtype)
        model.load_state_dict(loaded.state_dict())
        if n_classes != model.config.num_classes:
            model.reset_classifier(n_classes)
        return model
    options: dict[str, Any] = {
        "num_classes": n_classes,
        "image_size": vision.size,
        "init_values": vision.init_values or None,
    }
    options |= {name: getattr(vision, name) for name in ("patch_size", "post_norm", "drop_path", "decay_lr", "shift")}
    if vision.causal:
        if section.generation != "vrwkv":
            raise InputError(f"vision.causal is for vrwkv, not {section.generation}")
        options["causal"] = True
    model = cls(cls.Config.sized(section.n_embd, section.n_layer, **options))
    model.init_weights()
    return model.to(dtype)


def prepare_model(model: Model, config: Config, vocab_size: int, precision: str) -> Model:
    """The model, with weights in float32 (float64 for that precision).

    Raises:
        InputError: its vocabulary is smaller than that of the data, `vocab_size`.
    """
    if model.config.vocab_size < vocab_size:
        raise InputError(
            f"{config.data.train}: has token ids up to {vocab_size - 1}, but the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}"
        )
    return model.to(_weight_dtype(precision))


def _weight_dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision == "float64" else torch.float32


def build_on_devices(config: Config, vocab_size: int, precision: str, accelerator: Accelerator) -> Model:
    """`build_model` on the device of this process, or sharded over the devices of all processes."""
    shard, device = config.run.shard, accelerator.device
    if shard == "none" or accelerator.num_processes == 1:
        return build_model(config, vocab_size, precision).to(device)
    model = build_model(config, vocab_size, precision, "cpu" if accelerator.is_main_process else "meta")
    return fsdp.shard_model(model, shard, device)
