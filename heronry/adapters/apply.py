"""Apply an adapter from its folder to a model, however the model's weights are stored."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..models import Model
from .lora import Adapter, load_adapter_weights, merge_adapter, read_adapter


def apply_adapter(model: Model, folder: str | Path) -> Adapter:
    """Applies the adapter in `folder` to `model`, in place.

    Plain weights are merged with it. Packed weights cannot be, so there it stays beside the matrices, which needs peft.

    Args:
        model: the base model that the adapter was trained on.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        The adapter, with its notes.

    Raises:
        InputError: see `read_adapter`; also for a model that already has adapters, for DoRA on packed weights, and for
            packed weights where peft is not installed.
    """
    if model.adapted_from is not None:
        raise InputError("the model already has adapters")
    adapter = read_adapter(folder, model)
    if model.quantization is None:
        merge_adapter(model, adapter)
        return adapter
    from .inject import inject_adapter  # needs peft, an optional package that takes seconds to import

    try:
        # the alpha that gives this scale: rank-stabilised LoRA divides by another number
        alpha = adapter.scale * adapter.rank
        inject_adapter(model, adapter.rank, alpha, dora=adapter.dora, targets=adapter.matrices)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    load_adapter_weights(model, adapter)
    model.requires_grad_(False)
    return adapter
