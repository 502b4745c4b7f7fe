"""`heronry convert`: the same model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file or folder of any format.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="NAME.pth, .safetensors, .st, .gguf, .bin, .onnx, or a new folder."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="blinkdl, safetensors, webrwkv, gguf, ggml, heronry, huggingface, vision_rwkv, onnx, onnx-step.",
            show_default="by the name of OUT",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=options.DTYPES + ", for GGUF q8_0.", show_default="as in IN"),
    ] = None,
    tokenizer: options.Tokenizer = None,
    ln_x_eps: options.LnXEps = None,
    shard: Annotated[float, typer.Option(help="The largest file of a folder, in GB.")] = 2.0,
    force: options.Force = False,
) -> None:
    """Convert a model to another format. The logits of both are compared. See docs/conversion.md."""
    from ..convert import conversion, target_formats
    from .copies import locate_source_and_target, replaced_folder
    from .progress import note, progress_bar

    if not 1e-9 <= shard <= 1e9:  # nor NaN
        raise InputError(f"--shard must be a number of GB from 1e-9 to 1e9, got {shard}")
    original, target = locate_source_and_target(source, target, force, "name")
    is_graph = (to or target_formats.format_of(target)) in target_formats.GRAPHS
    bar = progress_bar("exporting to ONNX") if is_graph else progress_bar("reading", in_bytes=True)
    with bar as update, replaced_folder(target) as written:

        def show_progress(done: int, total: int) -> None:
            update(done, total, "writing")

        result = conversion.convert(
            original, written, to, dtype, tokenizer, round(shard * 1e9), show_progress, ln_x_eps=ln_x_eps
        )
    logits = "equal"
    if result.difference != 0:
        logits = f"differ by at most {result.difference:.2g} (largest logit {result.largest:.3g})"
    note(f"{target}: {result.format}, {result.bytes / 1e6:,.1f} MB; logits of both: {logits}")
