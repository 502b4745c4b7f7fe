"""Builds the model that a configuration names, ready for training."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from ..checkpoint import load
from ..errors import InputError
from ..models import MODELS, VISION_MODELS, Model, Network, VisionModel
from ..models.native_step import has_fast_matmul
from . import fsdp
from .config import Config

log = logging.getLogger("heronry")


def uses_cuda(device: str) -> bool:
    """Whether run.device is a GPU here; one with a number becomes the current one.

    Raises:
        InputError: there is no such GPU.
    """
    if not device.startswith("cuda"):
        return device == "auto" and torch.cuda.is_available()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise InputError(f"run.device={device}, but PyTorch sees {count or 'no'} GPU{'' if count == 1 else 's'} here")
    if ":" in device:
        torch.cuda.set_device(index)
    return True


def check_model_memory(config: Config, n_vectors: int, device: torch.device) -> None:
    """InputError if a new model of the configured sizes cannot be trained in the memory of the device: weights,
    gradients and the two moments of Adam take 16 bytes per weight, of which sharding leaves 4 on the main process.

    n_vectors: rows of the matrices outside of the blocks.
    """
    section = config.model
    if section.path:
        return
    n_weights = (12 * section.n_layer * section.n_embd + n_vectors) * section.n_embd  # at least, in every generation
    size = (16 if config.run.shard == "none" else 4) * n_weights
    available = _memory_of(device)
    if size > available:
        raise InputError(
            f"model.n_layer={section.n_layer} and model.n_embd={section.n_embd} make {n_weights / 1e9:,.1f} billion "
            f"weights; training them takes at least {size / 1e9:,.0f} GB, and {device} has {available / 1e9:,.0f} GB"
        )


def check_pass_memory(
    model: Network, n_tokens: int, itemsize: int, keeps_little: bool, device: torch.device, what: str, advice: str
) -> None:
    """InputError if a forward and backward pass over so many tokens (or patches) cannot fit in the memory of the
    device: its logits and ten vectors per token and block, which is less than any model keeps.

    Args:
        itemsize: bytes of an activation.
        keeps_little: one vector per token and block, as with checkpointing.
        what: the size of the pass, for the message, and advice: what to change.
    """
    config = model.config
    vectors = (1 if keeps_little else 10) * getattr(config, "n_layer", 0) * getattr(config, "n_embd", 0)
    size = n_tokens * (vectors + getattr(config, "vocab_size", 0)) * itemsize
    available = _memory_of(device)
    if size > available:
        needed, there = (f"{x / 1e9:,.0f} GB" for x in (size, available))
        raise InputError(f"a pass of {what} takes at least {needed}, and {device} has {there}; {advice}")


def _memory_of(device: torch.device) -> int:
    """Bytes of memory that a process can have there at most."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


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
        if model.quantization is not None and section.tune not in ("lora", "miss"):
            raise InputError(
                f"{section.path}: quantized weights cannot be trained, except with model.tune=lora or miss"
            )
        if section.tune == "all" and device != "meta" and model.has_copied_head():
            log.warning("heronry: %s: the head is tied to the embedding; training keeps the two apart", section.path)
        if section.tune == "state":
            model.tune_state()
        elif section.tune != "all":
            from ..adapters.inject import inject_adapter, inject_miss  # needs peft, which takes seconds to import

            rank, dropout, targets, path = section.rank, section.dropout, section.targets, section.path
            if section.tune == "miss":
                inject_miss(model, rank, section.miss_variant, section.mini_r, dropout, targets, path)
            else:
                inject_adapter(model, rank, section.alpha, dropout, section.tune == "dora", targets, path)
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
            f"{config.data.name}: has token ids up to {vocab_size - 1}, but the model's vocabulary ends at "
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
