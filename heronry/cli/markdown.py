"""Markdown as it is written by a model: rendered block by block, the last one again with every piece."""

from __future__ import annotations

from collections.abc import Iterable

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from .output import no_echo

# What a model writes as HTML or as the target of a link is part of its answer: it is shown, not obeyed.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")


def print_markdown(console: Console, pieces: Iterable[str]) -> None:
    """Prints a text that comes in pieces. Words are not cut at the edge, and a line break stays one."""
    block = ""
    with no_echo():
        live = Live(console=console, refresh_per_second=10)
        live.start()
        try:
            for piece in pieces:
                *done, block = split_blocks(block + piece)
                for text in done:
                    _finish(live, text)
                    console.print()
                    live = Live(console=console, refresh_per_second=10)
                    live.start()
                live.update(_render(block))
        finally:
            _finish(live, block)


def split_blocks(text: str) -> list[str]:
    """The text cut at its empty lines, those in fenced code apart; the last block may go on."""
    blocks = [""]
    fenced = False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if line == "\n" and not fenced:
            if blocks[-1]:
                blocks.append("")
        else:
            blocks[-1] += line
    return blocks


def _finish(live: Live, text: str) -> None:
    live.update(_render(text))
    live.stop()


def _render(text: str) -> Markdown:
    """Two spaces at the end of a line keep its break, which Markdown would make a space."""
    markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    markdown.parsed = PARSER.parse(text.replace("\n", "  \n"))
    return markdown
