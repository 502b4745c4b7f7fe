"""The configurations of all generations as classes of `transformers`, with the keys of the hub's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ...formats import huggingface
from ...models import MODELS, Model


class RwkvBaseConfig(PreTrainedConfig):
    """The keys that all generations share. None = as in the training recipe."""

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "context_length"}

    vocab_size: int = 65536
    hidden_size: int = 768
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    context_length: int = 4096
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def to_heronry(self) -> tuple[type[Model], Any]:
        """The class of the heronry model and its configuration."""
        settings = huggingface.read_config({"model_type": self.model_type, **self.to_dict()})
        cls = MODELS[settings.pop("model")]
        head_size = {"head_size": settings["head_size"]} if "head_size" in settings else {}
        default = cls.Config.sized(self.vocab_size, self.num_hidden_layers, self.hidden_size, **head_size)
        known = {field.name for field in fields(default)}
        return cls, replace(default, **{key: value for key, value in settings.items() if key in known})

    @classmethod
    def from_heronry(cls, model: Model, notes: Mapping[str, Any] | None = None) -> RwkvBaseConfig:
        """The configuration of a heronry model. notes: see `heronry.save`."""
        config = huggingface.config_json(model.name, model.config, notes or {}, model.dtype)
        return CONFIGS[config["model_type"]](**config)


class RwkvConfig(RwkvBaseConfig):
    """RWKV-4, with the keys of transformers' own class."""

    model_type: ClassVar[str] = "rwkv"

    vocab_size: int = 50277
    attention_hidden_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    rescale_every: int = 6
    num_attention_heads: int | None = 1  # it has no heads, but peft requires a number


class Rwkv5Config(RwkvConfig):
    """RWKV-5."""

    model_type: ClassVar[str] = "rwkv5"

    vocab_size: int = 65536
    head_size: int = 64
    head_size_divisor: int | float = 8
    num_attention_heads: int | None = None
    version: str = "5.2"


class Rwkv6Config(RwkvConfig):
    """RWKV-6."""

    model_type: ClassVar[str] = "rwkv6"

    vocab_size: int = 65536
    head_size: int = 64
    head_size_divisor: int | float = 8
    num_attention_heads: int | None = None
    time_mix_extra_dim: int | None = None
    time_decay_extra_dim: int | None = None


class RWKV7Config(RwkvBaseConfig):
    """RWKV-7, with the keys of the official repositories; those of flash-linear-attention stay as they are read."""

    model_type: ClassVar[str] = "rwkv7"

    head_dim: int = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    norm_bias: bool = True
    norm_eps: float = 1e-5

    def to_dict(self) -> dict[str, Any]:
        config: dict[str, Any] = super().to_dict()
        if config.get("architectures") and huggingface.layout_of(config) == "huggingface":  # the name of its class
            config["architectures"] = [name.replace("RWKV7", "Rwkv7") for name in config["architectures"]]
        return config


CONFIGS: dict[str, type[RwkvBaseConfig]] = {
    config.model_type: config for config in (RwkvConfig, Rwkv5Config, Rwkv6Config, RWKV7Config)
}
