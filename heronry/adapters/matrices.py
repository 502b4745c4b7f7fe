"""The matrices of a model that adapters can change, and how they are changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import Model
from ..models.layers import Linear, PackedLinear
from ..ops.packed import dequantize, untile

Matrix = Linear | PackedLinear


def adaptable_matrices(model: Model) -> dict[str, Matrix]:
    """Matrices by name, like "blocks.0.att.key", whether or not they already have an adapter."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, Matrix))
    return {name.removesuffix(".base_layer"): m for name, m in modules}


def weight_of(matrix: nn.Module) -> Tensor:
    """[out, in]; of a packed matrix the weights that it stands for, in float32."""
    if isinstance(matrix, PackedLinear):
        return dequantize(*untile(matrix.weight, matrix.scales, matrix.out_features))
    weight: Tensor = matrix.weight  # type: ignore[assignment]
    return weight


def beside_of(matrix: Matrix, x: Tensor) -> nn.Parameter:
    """A frozen copy of x where the matrix is, in float32, or float64 for a float64 matrix."""
    dtype = torch.float64 if matrix.weight.dtype == torch.float64 else torch.float32
    return nn.Parameter(x.to(matrix.weight.device, dtype), requires_grad=False)


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
