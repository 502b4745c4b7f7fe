"""`heronry info`: what a checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..checkpoint import load
from ..errors import InputError
from ..models import Model, Network
from ..models.layers import PackedLinear
from ..text.tokenizers import guess


def info(path: Path) -> None:
    """Prints generation, sizes, parameters, memory and the likely tokenizer; reads no weights."""
    model: Network = load(path, device="meta")
    config = asdict(model.config)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    in_matrices = sum(m.in_features * m.out_features for m in packed)
    parameters = in_matrices + sum(p.numel() for p in model.parameters())
    weights = f"{_size(4 * parameters)} in float32, {_size(2 * parameters)} in bfloat16 or float16"
    if packed:
        weights = _size(sum(x.nbytes for x in (*model.parameters(), *model.buffers())))
    table = Table.grid(padding=(0, 2))
    table.add_row("generation", f"{model.name} {config.pop('version', '')}".strip())
    table.add_row("dtype", str(next(p for p in model.parameters()).dtype).removeprefix("torch."))
    if model.quantization:
        table.add_row("quantization", model.quantization)
    for name, value in config.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    table.add_row("parameters", f"{parameters:,}")
    if isinstance(model, Model):
        state = model.initial_state().nbytes
        table.add_row("state", f"{_size(state)} a sequence, float32, whatever its length")
    table.add_row("weights", weights)
    if isinstance(model, Model):
        table.add_row("tokenizer", _tokenizer(model, path.expanduser()))
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(table)


def _tokenizer(model: Model, path: Path) -> str:
    try:
        return str(guess(model.config.vocab_size, path if path.is_dir() else path.parent))
    except InputError as error:
        return str(error)


def _size(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
