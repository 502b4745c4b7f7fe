"""`heronry eval`: what texts cost a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..engine.llm import LLM
from ..evaluate import bits, lambada, read_texts


def run(
    files: list[Path],
    model: Path | None,
    tokenizer: str | None,
    dtype: str | None,
    device: str,
    quantize: str | None,
    adapter: Path | None,
    last_words: bool,
    key: str,
) -> None:
    """Prints a line a file."""
    texts = {file: read_texts(file, key) for file in files}
    llm = LLM(model, tokenizer=tokenizer, dtype=dtype, device=device, quantize=quantize, adapter=adapter)
    progress, out = Console(stderr=True), Console(highlight=False, soft_wrap=True)

    def shown(passes: Iterable[Any], total: int) -> Iterable[Any]:
        return track(passes, "reading", total=total, console=progress, transient=True)

    for file, some in texts.items():
        if last_words:
            perplexity, accuracy = lambada(llm, some, shown)
            out.print(f"{file}: {len(some):,} passages, perplexity {perplexity:.2f}, accuracy {accuracy:.2%}")
        else:
            told = bits(llm, some, shown)
            out.print(
                f"{file}: {told.bits_per_byte:.4f} bits a byte, perplexity {told.perplexity:.2f} a token "
                f"({told.bytes:,} bytes, {told.tokens:,} tokens, {len(some):,} texts)"
            )
