"""Every RWKV generation: trained like a Transformer, run like an RNN."""

from .checkpoint import initial_state, load, save
from .engine.llm import LLM
from .errors import InputError
from .models import RWKV4, RWKV5, RWKV6, RWKV7, State
from .quantization import quantize

__all__ = [
    "LLM",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "InputError",
    "State",
    "initial_state",
    "load",
    "quantize",
    "save",
]
__version__ = "0.1.0"
