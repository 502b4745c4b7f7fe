"""`heronry eval`: how well a model predicts texts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .output import print_result


def eval(
    files: Annotated[list[Path], typer.Argument(help="Texts, or .jsonl with one text a line, .parquet, folders.")],
    model: options.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Precision = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    ln_x_eps: options.LnXEps = None,
    state: Annotated[
        Path | None, typer.Option(help="Start each text from a tuned state (time_state.safetensors, a .pth).")
    ] = None,
    lambada: Annotated[bool, typer.Option("--lambada", help="Measure only the last word of each text.")] = False,
    key: Annotated[
        str | None, typer.Option(help="The field of a row that holds its text.", show_default="text")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the files by name.")] = False,
) -> None:
    """Measure bits per byte, perplexity or LAMBADA. See docs/evaluation.md."""
    from .. import evaluate
    from ..errors import count
    from .progress import progress_bar

    texts = {file: evaluate.read_texts(file, key) for file in files}
    llm = options.load_llm(model, tokenizer, dtype, device, threads, quantize, adapter, ln_x_eps)
    if state is not None:
        llm.begin_from(state)
    figures = {}
    for file, passages in texts.items():
        with progress_bar(str(file)) as progress:
            if lambada:
                words = evaluate.score_lambada(llm, passages, progress)
                figures[str(file)] = {"passages": len(passages), **asdict(words)}
                line = f"{count(len(passages), 'passage')}, perplexity {words.perplexity:.2f}"
                line += f", accuracy {words.accuracy:.2%}"
            else:
                score = evaluate.score_texts(llm, passages, progress)
                figures[str(file)] = {"texts": len(passages), **asdict(score)}
                figures[str(file)] |= {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}
                line = f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f} per token "
                line += (
                    f"({count(score.bytes, 'byte')}, {count(score.tokens, 'token')}, {count(len(passages), 'text')})"
                )
        if not as_json:
            print_result(f"{file}: {line}")
    if as_json:
        print_result(json.dumps(figures, indent=2, ensure_ascii=False))
