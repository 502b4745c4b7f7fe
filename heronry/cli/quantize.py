"""`heronry quantize`: a smaller copy of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder of any format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", "-f", help="int8 or int4.")] = "int8",
    dtype: options.Precision = None,
    ln_x_eps: options.LnXEps = None,
) -> None:
    """Quantize a model to 8 or 4 bits per weight. See docs/quantization.md."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from .. import quantization
    from ..checkpoint import load, save
    from ..models import Network
    from .copies import companions, locate_source_and_target

    source, target = locate_source_and_target(source, target)
    console = Console(stderr=True)
    model = load(source, dtype=dtype, ln_x_eps=ln_x_eps, kind=Network)
    size_before = sum(p.nbytes for p in model.parameters())
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as bar:
        task = bar.add_task(f"quantizing to {format}", total=None)
        quantization.quantize(model, format, lambda done, total: bar.update(task, completed=done, total=total))
    save(model, target, *companions(source, model))
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    console.print(
        f"{target}: {size / 2**20:.0f} MiB, {size / size_before:.0%} of the original",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
