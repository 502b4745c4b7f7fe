"""The model that a configuration names, as it is trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator

from ..checkpoint import load
from ..errors import InputError
from ..models import MODELS, VISION_MODELS, Model, VisionModel
from ..models.native_step import has_fast_matmul
from . import fsdp
from .config import Config


def precision(config: Config, device: torch.device) -> str:
    """Of the activations."""
    if config.run.precision != "auto":
        return config.run.precision
    fast = device.type != "cpu" or has_fast_matmul(torch.bfloat16)
    return "bfloat16" if fast else "float32"


def make(config: Config, vocabulary: int, precision: str, device: str = "cpu") -> Model:
    """The model with what is tuned of it. On the meta device it has no numbers.

    vocabulary: of the data; InputError if the model does not know all of it.
    """
    told = config.model
    if told.path:
        model = load(told.path, _wide(precision), device, quantize=told.quantize or None)
        if model.quantization is not None and told.tune != "lora":
            raise InputError(f"{told.path}: is quantized, and packed weights cannot be trained; model.tune=lora can")
        if told.tune == "state":
            model.tune_state()
        elif told.tune != "all":
            from ..adapters.inject import inject_adapter

            inject_adapter(model, told.rank, told.alpha, told.dropout, told.tune == "dora", told.targets, told.path)
    else:
        cls = MODELS[told.generation]
        size = told.vocab_size or -(-vocabulary // 64) * 64
        with torch.device(device):
            model = cls(cls.Config.sized(size, told.n_layer, told.n_embd))
        if device != "meta":
            model.init_weights()
    return fit(model, config, vocabulary, precision)


def make_vision(config: Config, classes: int, precision: str) -> VisionModel:
    """The model of pictures of so many classes; one from a file with other classes gets a new head."""
    told, sizes = config.model, config.vision
    cls = VISION_MODELS[told.generation]
    if told.path:
        read = load(told.path, _wide(precision), kind=VisionModel)
        if not isinstance(read, cls):
            raise InputError(f"{told.path}: is a {read.name}, not a {told.generation}")
        model = cls(replace(read.config, drop_path=sizes.drop_path, decay_lr=sizes.decay_lr)).to(_wide(precision))
        model.load_state_dict(read.state_dict())
        if classes != model.config.num_classes:
            model.reset_classifier(classes)
        return model
    other = {"num_classes": classes, "image_size": sizes.size, "init_values": sizes.init_values or None}
    other |= {name: getattr(sizes, name) for name in ("patch_size", "post_norm", "drop_path", "decay_lr", "shift")}
    if sizes.causal:
        if told.generation != "vrwkv":
            raise InputError(f"vision.causal is for vrwkv, not {told.generation}")
        other["causal"] = True
    model = cls(cls.Config.sized(told.n_embd, told.n_layer, **other))
    model.init_weights()
    return model.to(_wide(precision))


def fit(model: Model, config: Config, vocabulary: int, precision: str) -> Model:
    """The model with weights as wide as training needs; InputError if the data have ids that it does not know."""
    if model.config.vocab_size < vocabulary:
        raise InputError(
            f"{config.data.train}: has token ids up to {vocabulary - 1}, the model's vocabulary ends at "
            f"{model.config.vocab_size - 1}"
        )
    return model.to(_wide(precision))


def _wide(precision: str) -> torch.dtype:
    return torch.float64 if precision == "float64" else torch.float32


def place(config: Config, vocabulary: int, precision: str, accelerator: Accelerator) -> Model:
    """The model on the device of this process, or in pieces on those of all."""
    kind, device = config.run.shard, accelerator.device
    if kind == "none" or accelerator.num_processes == 1:
        return make(config, vocabulary, precision).to(device)
    model = make(config, vocabulary, precision, "cpu" if accelerator.is_main_process else "meta")
    return fsdp.shard(model, kind, device)
