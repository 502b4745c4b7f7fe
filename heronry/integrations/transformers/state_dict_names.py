"""The names of weights in state_dict() and load_state_dict(): those of the hub, unless there are adapters inside.

save_pretrained, Trainer and others then write what other readers of the hub's repositories expect. The modules keep
BlinkDL's names ("key", "value", "receptance"), and so do adapters of peft.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...formats import huggingface
from ...formats.lazy_tensor import LazyTensor, same_numbers


def rename_to_hub(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook for state_dict(), of a module that has a heronry model as `.rwkv`: BlinkDL's names -> the hub's."""
    inside = f"{prefix}rwkv."
    names = {name: name.removeprefix(inside) for name in state if name.startswith(inside)}
    if not names or _has_adapters(names.values()):
        return
    tensors = {short: LazyTensor.from_tensor(state.pop(name)) for name, short in names.items()}
    layout = huggingface.layout_of(vars(module.config))
    for name, x in huggingface.from_blinkdl(tensors, layout).items():
        state[prefix + name] = x.read()


def rename_from_hub(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A hook for load_state_dict(): the hub's names -> BlinkDL's."""
    names = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if _has_adapters(names) or any(name.startswith("rwkv.emb.") for name in names.values()):
        return
    tensors = {short: LazyTensor.from_tensor(state.pop(name)) for name, short in names.items()}
    rwkv: Any = module.get_submodule("rwkv")
    shapes = {name: p.shape for name, p in rwkv.named_parameters()}
    for name, x in huggingface.to_blinkdl(tensors).items():
        if name in rwkv.ignored_keys:
            continue
        value = x.read()
        if name in shapes and same_numbers(value.shape, shapes[name]):
            value = value.reshape(shapes[name])
        state[f"{prefix}rwkv.{name}" if name in shapes else prefix + name] = value


def _has_adapters(names: Iterable[str]) -> bool:
    """Whether these are names of a model with adapters of peft inside."""
    return any("lora_" in name or ".base_layer." in name or "modules_to_save" in name for name in names)
