"""`heronry eval`: how well a model predicts texts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from . import options

Item = TypeVar("Item")


def eval(
    files: Annotated[list[Path], typer.Argument(help="Texts, or .jsonl with one text a line.")],
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    ln_x_eps: options.LnXEps = None,
    lambada: Annotated[bool, typer.Option("--lambada", help="Measure only the last word of each text.")] = False,
    key: Annotated[str, typer.Option(help="The field of a .jsonl line that holds its text.")] = "text",
) -> None:
    """Measure bits per byte, perplexity or LAMBADA. See docs/evaluation.md."""
    from rich.console import Console
    from rich.progress import track

    from .. import evaluate
    from ..engine.llm import LLM

    texts = {file: evaluate.read_texts(file, key) for file in files}
    llm = LLM(
        model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        quantize=quantize,
        adapter=adapter,
        ln_x_eps=ln_x_eps,
    )
    progress, out = Console(stderr=True), Console(highlight=False, soft_wrap=True, markup=False)

    def show_progress(passes: Iterable[Item], total: int) -> Iterable[Item]:
        return track(passes, "evaluating", total=total, console=progress, transient=True)

    for file, passages in texts.items():
        if lambada:
            words = evaluate.score_lambada(llm, passages, show_progress)
            out.print(
                f"{file}: {len(passages):,} passages, perplexity {words.perplexity:.2f}, accuracy {words.accuracy:.2%}"
            )
        else:
            result = evaluate.score_texts(llm, passages, show_progress)
            out.print(
                f"{file}: {result.bits_per_byte:.4f} bits per byte, perplexity {result.perplexity:.2f} per token "
                f"({result.bytes:,} bytes, {result.tokens:,} tokens, {len(passages):,} texts)"
            )
