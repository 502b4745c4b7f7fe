"""`heronry merge`: one model out of a model and an adapter."""

from __future__ import annotations

from pathlib import Path

from .. import adapters
from ..adapters.rwkv_peft import merge_rwkv_peft
from ..checkpoint import load_found, save
from ..errors import InputError
from ..models import Model
from .quantize import apart, belongings


def merge(
    source: Path, folder: Path, target: Path, dtype: str | None, alpha: float | None, beginning: Path | None
) -> None:
    """Writes the folder `target`, with tokenizer and notes of `source`; the notes of the adapter count for more."""
    source, target = apart(source, target)
    model: Model = load_found(source, dtype=dtype)[0]
    tokenizer, notes = belongings(source, model)
    if folder.is_file():
        merge_rwkv_peft(model, folder, alpha, beginning)
        save(model, target, tokenizer, notes)
        print(target)
        return
    if alpha is not None or beginning is not None:
        raise InputError(f"{folder}: --alpha and --beginning are for a file of RWKV-PEFT; a folder says what it needs")
    adapter = adapters.read_adapter(folder, model)
    if model.quantization is not None:
        raise InputError(
            f"{source}: is packed in {model.quantization}, where nothing can be merged; merge into the original it was "
            "made from, which this adapter fits, and pack the result"
        )
    adapters.merge_adapter(model, adapter)
    save(model, target, tokenizer, notes | adapter.notes)
    print(target)
