"""`heronry convert`: the same model in another format."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..convert import convert


def run(source: Path, target: Path, to: str | None, dtype: str | None, tokenizer: str | None, shard: float) -> None:
    """Converts, with a bar on the terminal, and prints how far the logits of both files are apart."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def told(count: int, total: int) -> None:
            bar.update(task, description="writing", advance=count, total=total)

        made = convert(source, target, to, dtype, tokenizer, round(shard * 1e9), told)
    away = "the same" if made.difference == 0 else f"at most {made.difference:.2g} away, of {made.largest:.3g}"
    console.print(f"{target}: {made.format}, {made.bytes / 1e6:,.1f} MB; logits of both: {away}", highlight=False)
