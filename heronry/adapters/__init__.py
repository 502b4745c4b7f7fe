"""LoRA, DoRA and other small files that change a model: read, merged, or kept beside its matrices."""

from .lora import SETTINGS, WEIGHTS, Adapter, adaptable, apply, merge, read_adapter, restore_adapter, save_adapter

__all__ = [
    "SETTINGS",
    "WEIGHTS",
    "Adapter",
    "adaptable",
    "apply",
    "merge",
    "read_adapter",
    "restore_adapter",
    "save_adapter",
]
