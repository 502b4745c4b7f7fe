"""`rookery quantize`: a smaller model out of a large one."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ..checkpoint import NOTES, load, locate, save
from ..errors import InputError
from ..quantize import quantize
from ..tokenizers import guess


def pack(source: Path, target: Path, format: str, dtype: str | None) -> None:
    """Reads `source`, packs its matrices and writes the folder `target`, with tokenizer and notes of `source`."""
    source, target = locate(source), target.expanduser()
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is where the original lies; give another folder")
    console = Console(stderr=True)
    model = load(source, dtype=dtype)
    size = sum(p.nbytes for p in model.parameters())
    quantize(model, format, lambda matrices: track(matrices, f"packing in {format}", console=console))
    folder = source if source.is_dir() else source.parent
    try:
        tokenizer = guess(model.config.vocab_size, folder)
    except InputError:
        tokenizer = None  # to be named with the copy as with the original
    notes = json.loads((source / "config.json").read_text()) if source.is_dir() else {}
    save(
        model,
        target,
        tokenizer if isinstance(tokenizer, Path) else None,
        {key: notes[key] for key in NOTES if key in notes},
    )
    packed = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    console.print(f"{target}: {packed / 2**20:.0f} MiB, {packed / size:.0%} of what it was", highlight=False)
