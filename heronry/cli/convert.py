"""`heronry convert`: the same model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file or folder of any format.")],
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
        typer.Option(help="float32, bfloat16, float16, for GGUF also q8_0.", show_default="as in IN"),
    ] = None,
    tokenizer: options.Tokenizer = None,
    ln_x_eps: options.LnXEps = None,
    shard: Annotated[float, typer.Option(help="The largest file of a folder, in GB.")] = 2.0,
) -> None:
    """Convert a model to another format. The logits of both are compared. See docs/conversion.md."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ..convert import conversion

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def show_progress(done: int, total: int) -> None:
            bar.update(task, description="writing", completed=done, total=total)

        result = conversion.convert(
            source, target, to, dtype, tokenizer, round(shard * 1e9), show_progress, ln_x_eps=ln_x_eps
        )
    logits = "equal"
    if result.difference != 0:
        logits = f"differ by at most {result.difference:.2g} (largest logit {result.largest:.3g})"
    console.print(
        f"{target}: {result.format}, {result.bytes / 1e6:,.1f} MB; logits of both: {logits}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
