"""Every RWKV as an ordinary model of `transformers`.

    heronry.integrations.transformers.register()

adds these classes to AutoConfig, AutoModelForCausalLM, AutoModel and AutoTokenizer, for the layouts on the hub:
`RWKV/rwkv-4-*` ("rwkv"), `RWKV/rwkv-5-*` ("rwkv5"), `RWKV/rwkv-6-*` ("rwkv6"), the official `RWKV/RWKV7-*-2026*` and
flash-linear-attention's `RWKV/RWKV7-Goose-*` ("rwkv7"). For RWKV-4 they replace transformers' own class.
"""

from ...text.jinja_templates import chat_template
from .. import require

require("transformers", "heronry[transformers]")

from .configs import Rwkv5Config, Rwkv6Config, RWKV7Config, RwkvConfig
from .modeling import (
    Rwkv5ForCausalLM,
    Rwkv5Model,
    Rwkv6ForCausalLM,
    Rwkv6Model,
    RWKV7ForCausalLM,
    RWKV7Model,
    RwkvForCausalLM,
    RwkvModel,
    RwkvPreTrainedModel,
)
from .registration import register
from .tokenizer import RwkvTokenizer

__all__ = [
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKV7Model",
    "Rwkv5Config",
    "Rwkv5ForCausalLM",
    "Rwkv5Model",
    "Rwkv6Config",
    "Rwkv6ForCausalLM",
    "Rwkv6Model",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvModel",
    "RwkvPreTrainedModel",
    "RwkvTokenizer",
    "chat_template",
    "register",
]
