"""The command line: puts the commands together, each of which has a file of its own.

Command files import nothing but typer and the standard library at the top; PyTorch, rich and the rest of the package
come in when a command runs. `heronry --help` and a misspelt option answer at once because of it.
"""

from __future__ import annotations

import io
import sys

import typer

from ..errors import InputError
from .bench import bench
from .chat import chat
from .convert import convert
from .data import data
from .eval import eval
from .generate import generate
from .info import info
from .merge import merge
from .quantize import quantize
from .see import see
from .train import train

app = typer.Typer(
    help="RWKV, every generation: trained like a Transformer, run like an RNN.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (generate, chat, info, quantize, merge, convert, eval, see, data, train, bench):
    app.command()(command)


def main() -> None:
    """Run a command; an InputError is printed in one line, with exit code 2."""
    # input that is not UTF-8 reaches the tokenizer, which reports it; what the terminal cannot show becomes "?"
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        app()
    except InputError as error:
        print(f"heronry: {error}", file=sys.stderr)
        sys.exit(2)
