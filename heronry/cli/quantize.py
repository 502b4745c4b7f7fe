"""`heronry quantize`: a smaller copy of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options


def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file or folder of any format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option("--format", "-f", help="int8 or int4.")] = "int8",
    dtype: options.WrittenPrecision = None,
    ln_x_eps: options.LnXEps = None,
    force: options.Force = False,
) -> None:
    """Quantize a model to 8 or 4 bits per weight. See docs/quantization.md."""
    from ..checkpoint import load, save
    from ..models import Network
    from .copies import companions, locate_source_and_target
    from .progress import note, progress_bar

    original, target = locate_source_and_target(source, target, force)
    if target.is_file():
        raise InputError(f"{target}: is a file; give the name of a folder")
    with progress_bar(f"quantizing to {format}", in_bytes=True) as progress:
        model = load(original, dtype=dtype, ln_x_eps=ln_x_eps, quantize=format, kind=Network, progress=progress)
    size_before = model.num_parameters() * model.dtype.itemsize
    save(model, target, *companions(original, model))
    size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    note(f"{target}: {size / 2**20:.0f} MiB, {size / size_before:.0%} of the original")
