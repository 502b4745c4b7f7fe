"""`rookery merge`: one model out of a model and an adapter."""

from __future__ import annotations

from pathlib import Path

from .. import adapters
from ..checkpoint import load, save
from ..errors import InputError
from .pack import apart, belongings


def merge(source: Path, folder: Path, target: Path, dtype: str | None) -> None:
    """Writes the folder `target`, with tokenizer and notes of `source`; the notes of the adapter count for more."""
    source, target = apart(source, target)
    model = load(source, dtype=dtype)
    adapter = adapters.read_adapter(folder, model)
    if model.quantization is not None:
        raise InputError(
            f"{source}: is packed in {model.quantization}, where nothing can be merged; merge into the original it was "
            "made from, which this adapter fits, and pack the result"
        )
    adapters.merge(model, adapter)
    tokenizer, notes = belongings(source, model)
    save(model, target, tokenizer, notes | adapter.notes)
    print(target)
