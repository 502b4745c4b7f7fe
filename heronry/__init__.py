"""Every RWKV generation: trained like a Transformer, run like an RNN."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import initial_state, load, save
    from .engine.chat import Chat
    from .engine.completion import Completion
    from .engine.llm import LLM
    from .engine.sampling import Sampling
    from .errors import InputError
    from .memory import release_memory
    from .models import RWKV4, RWKV5, RWKV6, RWKV7, Model, State, VisionModel
    from .quantization import quantize

__all__ = [
    "LLM",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "RWKV7",
    "Chat",
    "Completion",
    "InputError",
    "Model",
    "Sampling",
    "State",
    "VisionModel",
    "initial_state",
    "load",
    "quantize",
    "release_memory",
    "save",
]
__version__ = "0.1.0"

# A name brings its module, and with it PyTorch, on first use (PEP 562): `heronry --help` needs none of them.
_MODULES = {
    "Chat": ".engine.chat",
    "Completion": ".engine.completion",
    "LLM": ".engine.llm",
    "Model": ".models",
    "Sampling": ".engine.sampling",
    "RWKV4": ".models",
    "RWKV5": ".models",
    "RWKV6": ".models",
    "RWKV7": ".models",
    "InputError": ".errors",
    "State": ".models",
    "VisionModel": ".models",
    "initial_state": ".checkpoint",
    "load": ".checkpoint",
    "quantize": ".quantization",
    "release_memory": ".memory",
    "save": ".checkpoint",
}
_SUBMODULES = {"adapters", "checkpoint", "convert", "data", "engine", "evaluate", "formats", "integrations", "models"}
_SUBMODULES |= {"ops", "quantization", "text", "train", "view"}

if not TYPE_CHECKING:  # with it, a type checker would accept every misspelt name

    def __getattr__(name: str) -> object:
        """The public name or submodule, imported on first use."""
        if name in _SUBMODULES:
            return import_module(f".{name}", __name__)
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name], __name__), name)
        globals()[name] = value  # later lookups do not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*__all__, *_SUBMODULES, "__version__"})
