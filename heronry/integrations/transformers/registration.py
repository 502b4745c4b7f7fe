"""Adds the classes of this package to the Auto classes of transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configs import CONFIGS
from .modeling import BASE_MODELS, CAUSAL_LMS
from .tokenizer import RwkvTokenizer


def register() -> None:
    """Adds all classes to AutoConfig, AutoModelForCausalLM, AutoModel and AutoTokenizer. Can be called repeatedly."""
    for model_type, config in CONFIGS.items():
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, CAUSAL_LMS[config], exist_ok=True)
        AutoModel.register(config, BASE_MODELS[config], exist_ok=True)
        AutoTokenizer.register(config, RwkvTokenizer, exist_ok=True)
