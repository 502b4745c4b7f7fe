"""New adapters beside the matrices of a model, plain or packed, for training: LoRA and DoRA as layers of peft, MiSS as
our own (peft's knows no packed matrices)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import InputError
from ..models import Model
from ..models.layers import PackedLinear
from .matrices import Matrix, adaptable_matrices
from .miss import MiSS, MiSSLinear

try:
    from peft import LoraConfig, MissConfig, inject_adapter_in_model
    from peft.tuners import lora
except ModuleNotFoundError as error:
    raise InputError(f"training adapters needs {error.name}: pip install 'heronry[train]'") from error


class PackedLora(lora.Linear):
    """LoRA beside a packed matrix. Of the layer it wraps, peft only needs the sizes and the forward pass."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        """(in, out) of the matrix."""
        return module.in_features, module.out_features

    def merge(self, *args: Any, **options: Any) -> None:
        raise InputError("an adapter cannot be merged into packed weights; merge it into the original model")


def inject_adapter(
    model: Model,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    dora: bool = False,
    targets: Iterable[str] = (),
    base: str = "",
) -> Model:
    """Adds new adapters beside the matrices of a model, in place, and freezes everything else.

    They change nothing yet: A is random, B is zero. The model keeps its class, but its native step no longer runs.

    Args:
        model: the base model, plain or packed.
        rank: of A [rank, in] and B [out, rank].
        alpha: the product B A is scaled by alpha / rank.
        dropout: of the inputs of A, in training.
        dora: also learn a magnitude for each row; not for packed weights.
        targets: names of matrices, or their endings ("ffn.key", "value"); by default all matrices in the blocks.
        base: where the model was loaded from, recorded in adapter_config.json.

    Returns:
        The model itself.

    Raises:
        InputError: the model already has adapters, no matrix has one of the names, or DoRA is not possible.
    """
    if dora and model.quantization is not None:
        raise InputError("DoRA does not work beside packed weights: merge it into the original model, or train LoRA")
    names, matrices = _choose_matrices(model, targets)
    for full in matrices if dora else ():
        if not matrices[full].weight.any(dim=1).all():
            raise InputError(f"{full}.weight has rows of zeros, which have no magnitude for DoRA to learn")
    base_fingerprint = model.fingerprint
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # a float works as well
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=names,
        base_model_name_or_path=base or None,
    )
    config._register_custom_module({PackedLinear: PackedLora})  # peft has no public name for it
    inject_adapter_in_model(config, model)
    model.adapted_from = base_fingerprint
    model.invalidate_fingerprint()
    return model.train(model.training)


def inject_miss(
    model: Model,
    rank: int = 16,
    variant: str = "default",
    mini_r: int = 1,
    dropout: float = 0.0,
    targets: Iterable[str] = (),
    base: str = "",
) -> Model:
    """Adds new MiSS adapters beside the matrices of a model, in place, and freezes everything else.

    They begin at zero, so they change nothing yet. The model keeps its class, but its native step no longer runs.

    Args:
        model: the base model, plain or packed.
        rank: of the block [rank, out], at most in; of bat a divisor of in and out.
        variant: "default"; "mini" with a block [rank, mini_r] whose columns repeat; "bat", see miss.py.
        mini_r: of mini, a divisor of out.
        dropout: of the inputs of the block, in training; not of bat.
        targets, base: see `inject_adapter`.

    Returns:
        The model itself.

    Raises:
        InputError: the model already has adapters, no matrix has one of the names, or a matrix does not divide.
    """
    names, matrices = _choose_matrices(model, targets)
    layers = {}
    for name, matrix in matrices.items():
        rows, columns = matrix.out_features, matrix.in_features
        if variant == "bat" and (rows % rank or columns % rank):
            raise InputError(f"{name} [{rows}, {columns}] does not divide into blocks of rank {rank}, as bat needs")
        if variant == "mini" and rows % mini_r:
            raise InputError(f"{name} has {rows} outputs, not a multiple of mini_r = {mini_r}")
        shape = {"bat": (rows // rank, rank, rank), "mini": (rank, mini_r)}.get(variant, (rank, rows))
        change = MiSS(torch.zeros(shape))
        if change.misfit(rows, columns):
            raise InputError(f"{name} has {columns} inputs: the rank of MiSS is at most that, not {rank}")
        layers[name] = MiSSLinear(matrix, change, dropout)
    base_fingerprint = model.fingerprint
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.miss_block.requires_grad_(True)
    config = MissConfig(
        r=rank,
        miss_dropout=dropout,
        mini_r=mini_r,
        init_weights=True if variant == "default" else variant,  # type: ignore[arg-type]
        target_modules=names,
        base_model_name_or_path=base or None,
    )
    model.peft_config = {"default": config}  # type: ignore[assignment]  # as peft does
    model.adapted_from = base_fingerprint
    model.invalidate_fingerprint()
    return model.train(model.training)


def _choose_matrices(model: Model, targets: Iterable[str]) -> tuple[list[str], dict[str, Matrix]]:
    """The names that are adapted, as peft takes them, and the matrices that have them; see `inject_adapter`."""
    if model.adapted_from is not None:
        raise InputError("the model already has adapters")
    names = list(targets)
    matrices = adaptable_matrices(model)
    if not names:
        names = sorted({name.rpartition(".")[2] for name in matrices if name.startswith("blocks.")})
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in matrices):
            known = sorted({full.split(".", 2)[-1] for full in matrices})
            raise InputError(f"no matrix of this {model.name} is called {name!r}; known: {', '.join(known)}")
    chosen = [full for full in matrices if any(full == name or full.endswith(f".{name}") for name in names)]
    return names, {name: matrices[name] for name in chosen}
