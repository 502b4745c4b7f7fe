"""`heronry convert`: the same model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options
from .output import print_result


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file or folder of any format; or an adapter.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="NAME.pth, .safetensors, .st, .gguf, .bin, .onnx, or a new folder."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="blinkdl, safetensors, webrwkv, gguf, ggml, heronry, huggingface, fla, vision_rwkv, onnx, "
            "onnx-step; of an adapter peft or rwkv_lightning.",
            show_default="by the name of OUT",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Of an adapter: the model it is for.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=options.DTYPES + ", for GGUF q8_0.", show_default="as in IN"),
    ] = None,
    tokenizer: options.Tokenizer = None,
    ln_x_eps: options.LnXEps = None,
    shard: Annotated[float, typer.Option(help="The largest file of a folder, in GB.")] = 2.0,
    force: options.Force = False,
) -> None:
    """Convert a model to another format. The logits of both are compared. See docs/conversion.md.

    An adapter can be converted too: see docs/adapters.md.
    """
    from ..adapters import identify_adapter
    from ..convert import conversion, target_formats
    from .copies import locate_source_and_target, replaced_folder
    from .progress import note, progress_bar

    if not 1e-9 <= shard <= 1e9:  # nor NaN
        raise InputError(f"--shard must be a number of GB from 1e-9 to 1e9, got {shard}")
    original, target = locate_source_and_target(source, target, force, "name")
    if identify_adapter(original) is not None:
        _convert_adapter(original, target, to, dtype, model)
        return
    if model is not None:
        raise InputError(f"{source}: is a model; --model is for adapters")
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


def _convert_adapter(source: Path, target: Path, to: str | None, dtype: str | None, model: str | None) -> None:
    from ..adapters import read_adapter, write_lightning, write_peft
    from ..checkpoint import load, locate
    from ..checkpoint.loading import parse_dtype

    layout = to or ("rwkv_lightning" if target.suffix == ".pth" else "peft")
    if layout not in ("peft", "rwkv_lightning"):
        raise InputError(f"an adapter is written as peft or rwkv_lightning, not as {layout}")
    if layout == "peft" and (dtype is not None or target.suffix == ".pth"):
        raise InputError(f"{target}: peft's layout is a folder, in the dtype that the adapter has")
    if model is None:
        raise InputError(f"{source}: is an adapter; name its model with --model")
    base_file = locate(model)
    base = load(base_file)
    adapter = read_adapter(source, base, base_file=base_file)
    if layout == "peft":
        write_peft(adapter, base, target)
    else:
        write_lightning(adapter, base, target, base_file, parse_dtype(dtype or "bfloat16"))
    print_result(str(target))
