"""The matrices of a model that adapters can change, and how they are changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Model
from ..models.layers import Linear, PackedLinear


def adaptable_matrices(model: Model) -> dict[str, Linear | PackedLinear]:
    """Matrices by name, like "blocks.0.att.key", whether or not they already have an adapter."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, Linear | PackedLinear))
    return {name.removesuffix(".base_layer"): m for name, m in modules}


@torch.no_grad()
def replace_weights(model: Model, merged: Mapping[str, Tensor]) -> None:
    """Gives parameters, by name, the values that an adapter has made of them: all, or none with an InputError if one
    contains NaN or infinity once it is rounded to the dtype of the model. The model gets another fingerprint."""
    parameters = dict(model.named_parameters())
    rounded = {name: x.to(parameters[name].dtype) for name, x in merged.items()}
    for name, x in rounded.items():
        if not x.isfinite().all():
            raise InputError(f"{name} contains NaN or infinity after merging")
    for name, x in rounded.items():
        parameters[name].copy_(x)
    model.invalidate_fingerprint()
