"""`heronry info`: what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options


def info(
    file: Annotated[Path | None, typer.Argument(help="A checkpoint: a file or folder of any format.")] = None,
    model: options.Model = None,
) -> None:
    """Show the sizes and memory of a checkpoint.

    Also its generation, dtype and tokenizer. No weights are read.
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from ..checkpoint import load
    from ..engine.llm import BUNDLED
    from ..models import Model, Network
    from ..text.tokenizers import guess_tokenizer

    path = file or model or BUNDLED
    network = load(path, device="meta", kind=Network)
    config = asdict(network.config)
    n_parameters = network.num_parameters()
    weights = f"{_size(4 * n_parameters)} in float32, {_size(2 * n_parameters)} in bfloat16 or float16"
    if network.quantization:
        weights = _size(sum(x.nbytes for x in (*network.parameters(), *network.buffers())))
    table = Table.grid(padding=(0, 2))
    table.add_row("generation", f"{network.name} {config.pop('version', '')}".strip())
    table.add_row("dtype", str(network.dtype).removeprefix("torch."))
    if network.quantization:
        table.add_row("quantization", network.quantization)
    for name, value in config.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    table.add_row("parameters", f"{n_parameters:,}")
    if isinstance(network, Model):
        table.add_row("state", f"{_size(network.initial_state().nbytes)} a sequence of any length, in float32")
    table.add_row("weights", weights)
    if isinstance(network, Model):
        folder = path.expanduser()
        try:
            tokenizer = str(guess_tokenizer(network.config.vocab_size, folder if folder.is_dir() else folder.parent))
        except InputError as error:
            tokenizer = str(error)
        table.add_row("tokenizer", tokenizer)
    Console(highlight=False, soft_wrap=True, markup=False, emoji=False).print(table)


def _size(n_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} GiB"
