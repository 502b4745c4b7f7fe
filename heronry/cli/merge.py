"""`heronry merge`: one model made of a model and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from . import options
from .output import print_result


def merge(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="The model that the adapter was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The folder of a LoRA or DoRA adapter, or a file of RWKV-PEFT.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    dtype: options.WrittenPrecision = None,
    ln_x_eps: options.LnXEps = None,
    alpha: Annotated[float | None, typer.Option(help="For a LoRA file of RWKV-PEFT: its --lora_alpha.")] = None,
    pissa_init: Annotated[
        Path | None, typer.Option(help="For a PiSSA file of RWKV-PEFT: the file with its initial matrices.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Merge an adapter into the weights of its model. See docs/adapters.md."""
    from .. import adapters
    from ..adapters.rwkv_peft import merge_rwkv_peft
    from ..checkpoint import load, save
    from .copies import companions, locate_source_and_target
    from .progress import progress_bar

    original, target = locate_source_and_target(source, target, force)
    if target.is_file():
        raise InputError(f"{target}: is a file; give the name of a folder")
    with progress_bar("loading") as progress:
        model = load(original, dtype=dtype, ln_x_eps=ln_x_eps, progress=progress)
    tokenizer, notes = companions(original, model)
    if adapter.is_file():
        merge_rwkv_peft(model, adapter, alpha, pissa_init)
        save(model, target, tokenizer, notes)
        print_result(str(target))
        return
    if alpha is not None or pissa_init is not None:
        raise InputError(f"{adapter}: --alpha and --pissa-init are for files of RWKV-PEFT, not for adapter folders")
    folder = adapters.read_adapter(adapter, model)
    if model.quantization is not None:
        raise InputError(
            f"{source}: cannot merge into {model.quantization} weights; merge into the original model and quantize "
            "the result"
        )
    adapters.merge_adapter(model, folder)
    save(model, target, tokenizer, notes | folder.notes)  # the adapter's notes take precedence
    print_result(str(target))
