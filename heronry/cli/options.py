"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        help="A file or folder of any format, or hf://OWNER/REPOSITORY/FILE.",
        show_default="the bundled model",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="bytes, world or a tokenizer.json.",
        show_default="the one beside the model, else by vocabulary size",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16.", show_default="as in the file"),
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="int8 or int4: quantize the large matrices while loading."),
]
Adapter = Annotated[
    Path | None,
    typer.Option("--adapter", help="The folder of a LoRA or DoRA adapter to merge into the weights."),
]
LnXEps = Annotated[
    float | None,
    typer.Option("--ln-x-eps", help="Epsilon of the norm after the recurrence.", show_default="64e-5, or the file's"),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
