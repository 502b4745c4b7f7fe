"""`heronry quantize`: a smaller model out of a large one."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..checkpoint import load_found, locate, notes, save
from ..errors import InputError
from ..models import Model, Network
from ..quantization import quantize
from ..text.tokenizers import guess


def pack(source: Path, target: Path, format: str, dtype: str | None) -> None:
    """Reads `source`, packs its matrices and writes the folder `target`, with tokenizer and notes of `source`."""
    source, target = apart(source, target)
    console = Console(stderr=True)
    model: Network = load_found(source, dtype=dtype, kind=Network)[0]
    size = sum(p.nbytes for p in model.parameters())
    quantize(model, format, lambda matrices: track(matrices, f"packing in {format}", console=console))
    save(model, target, *belongings(source, model))
    packed = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    console.print(f"{target}: {packed / 2**20:.0f} MiB, {packed / size:.0%} of what it was", highlight=False)


def apart(source: Path, target: Path) -> tuple[Path, Path]:
    """Where the original lies and where what is made of it goes; InputError if they are the same."""
    source, target = locate(source), target.expanduser()
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is where the original lies; give another folder")
    return source, target


def belongings(source: Path, model: Network) -> tuple[Path | None, dict[str, Any]]:
    """What else a copy of the model in `source` should have: the file of its tokenizer, and its notes."""
    tokenizer: str | Path | None = None
    if isinstance(model, Model):
        with suppress(InputError):  # it is to be named with the copy as with the original
            tokenizer = guess(model.config.vocab_size, source if source.is_dir() else source.parent)
    told = json.loads((source / "config.json").read_text()) if source.is_dir() else {}
    told |= told.get("heronry") or {}  # where Hugging Face's config.json keeps ours
    return tokenizer if isinstance(tokenizer, Path) else None, notes(told)
