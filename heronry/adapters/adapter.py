"""An adapter, whichever file it came from, and the two ways to apply it: merged into the weights, where it costs
nothing, or beside them, where the weights stay as they are and several models share them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..formats.lazy_tensor import same_numbers
from ..models import Model
from .lora import LoRA
from .matrices import adaptable_matrices, replace_weights
from .miss import MiSS

Change = LoRA | MiSS


@dataclass(frozen=True)
class Adapter:
    """What was trained, checked against a model.

    Attributes:
        changes: of matrices, by their names.
        parameters: values that take the place of other parameters (norms, mixes), by name, as RWKV-PEFT trains them.
        notes: see `heronry.save`.
    """

    changes: Mapping[str, Change]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identifies it by all of its numbers."""
        digest = hashlib.sha256()
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name} {change.method} {change.scale} {getattr(change, 'axis', '')}".encode())
            for x in change.tensors():
                _update(digest, x)
        for name, x in sorted(self.parameters.items()):
            digest.update(name.encode())
            _update(digest, x)
        return digest.hexdigest()


def _update(digest: Any, x: Tensor) -> None:
    digest.update(f"{x.dtype} {list(x.shape)}".encode())
    digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def check_adapter(adapter: Adapter, model: Model) -> None:
    """InputError unless everything in the adapter has a place in the model, and is finite."""
    matrices, parameters = adaptable_matrices(model), dict(model.named_parameters())
    if not adapter.changes:
        raise InputError("holds no adapter of any matrix")
    for name, change in adapter.changes.items():
        if name not in matrices:
            raise InputError(f"an adapter of another model: it changes {name}, which this {model.name} does not have")
        if fault := change.misfit(matrices[name].out_features, matrices[name].in_features):
            raise InputError(f"an adapter of another model: {name} has {fault}")
        if not all(x.is_floating_point() and x.isfinite().all() for x in change.tensors()):
            raise InputError(f"the adapter of {name} contains NaN or infinity")
    for name, x in adapter.parameters.items():
        if name not in parameters or not same_numbers(x.shape, parameters[name].shape):
            raise InputError(f"an adapter of another model: unexpected tensor {name} {list(x.shape)}")
        if not x.isfinite().all():
            raise InputError(f"{name} contains NaN or infinity")


@torch.no_grad()
def merge_adapter(model: Model, adapter: Adapter) -> None:
    """Merges an adapter into the plain weights of a model, in place, which gives the model another fingerprint.

    Computes in float32 (float64 for a float64 model) and rounds once, to the dtype of the weights.

    Raises:
        InputError: packed weights, a model with adapters, or a matrix would contain NaN or infinity. The model is then
            unchanged.
    """
    if model.adapted_from is not None:
        raise InputError("the model already has adapters")
    if model.quantization is not None:
        raise InputError(
            f"cannot merge into {model.quantization} weights; merge into the original model and quantize the result"
        )
    matrices, parameters = adaptable_matrices(model), dict(model.named_parameters())
    merged = {}
    for name, change in adapter.changes.items():
        weight = matrices[name].weight
        merged[f"{name}.weight"] = change.merge(weight).to(weight.dtype)
    others = {name: x.reshape(parameters[name].shape) for name, x in adapter.parameters.items()}
    replace_weights(model, merged | others)


@torch.no_grad()
def attach_adapter(model: Model, adapter: Adapter) -> None:
    """Puts an adapter beside the matrices of a model, in place; they may be packed. The model gets the fingerprint of
    both together, and its native step no longer runs.

    Raises:
        InputError: the model already has adapters, or DoRA has no magnitude for a row of zeros. The model is then
            unchanged.
    """
    if model.adapted_from is not None:
        raise InputError("the model already has adapters")
    matrices, parameters = adaptable_matrices(model), dict(model.named_parameters())
    layers: dict[str, nn.Module] = {}
    for name, change in adapter.changes.items():
        try:
            layers[name] = change.beside(matrices[name]).train(model.training)
        except InputError as error:
            raise InputError(f"{name} {error}") from error
    for name, x in adapter.parameters.items():
        old = parameters[name]
        layers[name] = nn.Parameter(x.reshape(old.shape).to(old), requires_grad=False)  # type: ignore[assignment]
    base = model.fingerprint
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.adapted_from = base
    both = hashlib.sha256(f"{base} {adapter.fingerprint}".encode()).hexdigest()
    model.set_fingerprint(base[:16] + both[:16])  # the configuration is that of the base


def adapted_model(model: Model, adapter: Adapter) -> Model:
    """A model with an adapter beside its matrices that shares all weights with `model`, which stays as it is.

    Raises:
        InputError: see `attach_adapter`.
    """
    shared = {id(x): x for x in chain(model.parameters(), model.buffers())}
    adapted = copy.deepcopy(model, shared)
    adapted.set_fingerprint(model.fingerprint)
    attach_adapter(adapted, adapter)
    return adapted
