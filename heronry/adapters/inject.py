"""Adapters beside the matrices of a model, as peft's layers: for training, and for packed weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import InputError
from ..models import Model
from ..models.layers import PackedLinear
from .lora import adaptable

try:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora
except ModuleNotFoundError as error:
    raise InputError(f"this needs {error.name}: pip install 'heronry[train]'") from error


class PackedLora(lora.Linear):
    """LoRA beside a packed matrix. peft's layer asks no more of what it wraps than its sizes and its products."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *args: Any, **options: Any) -> None:
        raise InputError("an adapter cannot be merged into packed weights; merge it into the original")


def attach(
    model: Model,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    dora: bool = False,
    targets: Iterable[str] = (),
    base: str = "",
) -> Model:
    """Puts new adapters beside the matrices of a model, in place, and freezes all else; returns the model.

    They change nothing yet: A is random, B zeros. The model stays of its class; its native step does not run.

    Args:
        rank, alpha: sizes of A [rank, in] and B [out, rank]; the product counts alpha / rank.
        dropout: of the inputs of A, in training.
        dora: a learned length for each row, too; not for packed weights.
        targets: names of matrices, or how they end ("ffn.key", "value"); all in the blocks without.
        base: where the model came from, for adapter_config.json.

    Raises:
        InputError: a name that no matrix has, DoRA where it cannot be.
    """
    if model.adapted_from is not None:
        raise InputError("the model has adapters already")
    if dora and model.quantization is not None:
        raise InputError("DoRA does not go beside packed weights: merge it into the original, or train LoRA")
    names = list(targets)
    matrices = adaptable(model)
    if not names:
        names = sorted({name.rpartition(".")[2] for name in matrices if name.startswith("blocks.")})
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in matrices):
            known = sorted({full.split(".", 2)[-1] for full in matrices})
            raise InputError(f"no matrix of this {model.name} is called {name!r}; known are {', '.join(known)}")
    chosen = [full for full in matrices if any(full == name or full.endswith(f".{name}") for name in names)]
    for full in chosen if dora else ():
        if not matrices[full].weight.any(dim=1).all():
            raise InputError(f"{full}.weight has rows of zeros, to which DoRA can give no length")
    base_fingerprint = model.fingerprint
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=names,
        base_model_name_or_path=base or None,
    )
    config._register_custom_module({PackedLinear: PackedLora})
    inject_adapter_in_model(config, model)
    model.adapted_from, model._fingerprint = base_fingerprint, None
    return model.train(model.training)
