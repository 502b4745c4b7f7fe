"""LoRA, DoRA and other small files that change a model: read, merged, or kept beside its matrices."""

from .apply import apply_adapter
from .lora import SETTINGS, WEIGHTS, Adapter, merge_adapter, read_adapter, restore_adapter, save_adapter
from .matrices import adaptable_matrices

__all__ = [
    "SETTINGS",
    "WEIGHTS",
    "Adapter",
    "adaptable_matrices",
    "apply_adapter",
    "merge_adapter",
    "read_adapter",
    "restore_adapter",
    "save_adapter",
]
