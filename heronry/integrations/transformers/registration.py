"""Adds the classes of this package to the Auto classes of transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configs import CONFIGS
from .modeling import BASE_MODELS, CAUSAL_LMS
from .tokenizer import RwkvTokenizer

MATRICES = ("receptance", "key", "value", "gate", "output")  # of the time mix and the channel mix


def register() -> None:
    """Adds all classes to AutoConfig, AutoModelForCausalLM, AutoModel and AutoTokenizer, and their matrices to peft's
    default targets. Can be called repeatedly."""
    for model_type, config in CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, CAUSAL_LMS[config], exist_ok=True)
        AutoModel.register(config, BASE_MODELS[config], exist_ok=True)
        AutoTokenizer.register(config, RwkvTokenizer, exist_ok=True)
    _add_peft_targets()


def _add_peft_targets() -> None:
    """The names of our modules among those that peft adapts by default. It has them for RWKV-4, and for RWKV-7 those of
    flash-linear-attention's class, which stay."""
    try:
        from peft.utils import constants
    except ModuleNotFoundError:
        return
    for name, targets in vars(constants).items():
        if name.endswith("_TARGET_MODULES_MAPPING") and "rwkv" in targets:  # those of LoRA and its relatives
            for model_type in CONFIGS:
                targets[model_type] = sorted({*targets.get(model_type, ()), *MATRICES})
