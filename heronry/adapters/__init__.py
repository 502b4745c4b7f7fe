"""LoRA, DoRA, MiSS: small files that change a model, read in every layout, merged or kept beside its matrices."""

from .adapter import Adapter, adapted_model, attach_adapter, merge_adapter
from .matrices import adaptable_matrices
from .peft_folder import SETTINGS, WEIGHTS, save_adapter, write_peft
from .reading import apply_adapter, describe_adapter, identify_adapter, read_adapter, restore_adapter
from .rwkv_lightning import write_lightning

__all__ = [
    "SETTINGS",
    "WEIGHTS",
    "Adapter",
    "adaptable_matrices",
    "adapted_model",
    "apply_adapter",
    "attach_adapter",
    "describe_adapter",
    "identify_adapter",
    "merge_adapter",
    "read_adapter",
    "restore_adapter",
    "save_adapter",
    "write_lightning",
    "write_peft",
]
