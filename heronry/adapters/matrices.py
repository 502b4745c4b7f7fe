"""The matrices of a model that adapters can change."""

from __future__ import annotations

from ..models import Model
from ..models.layers import Linear, PackedLinear


def adaptable_matrices(model: Model) -> dict[str, Linear | PackedLinear]:
    """Matrices by name, like "blocks.0.att.key", whether or not they already have an adapter."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, Linear | PackedLinear))
    return {name.removesuffix(".base_layer"): m for name, m in modules}
