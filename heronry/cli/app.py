"""The command line: puts the commands together, each of which has a file of its own.

Command files import nothing but typer and the standard library at the top; PyTorch, rich and the rest of the package
come in when a command runs. `heronry --help` and a misspelt option answer at once because of it.

`main` is the one place where an error becomes a line on standard error and an exit code: 2 for what is wrong outside
(input, options, disk, permissions, memory), 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 and no line
where nobody reads the output any more. What is left, an error of heronry itself, keeps its traceback.
"""

from __future__ import annotations

import codecs
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from ..errors import InputError
from ..faults import describe
from ..text.terminal import printable
from .bench import bench
from .chat import chat
from .compare import compare
from .convert import convert
from .data import data
from .defaults import TYPES as DEFAULTS
from .defaults import config_file, read_defaults
from .eval import eval
from .generate import generate
from .info import info
from .list import list as list_models
from .merge import merge
from .pull import pull
from .quantize import quantize
from .rm import rm
from .see import see
from .serve import serve
from .signals import Terminated, signals_raise
from .train import train
from .view import view

ELSEWHERE = {  # where an option is that a message names, for commands that lack it
    "--tokenizer": "heronry data --tokenizer",
    "--dtype": "heronry convert --dtype",
    "--adapter": "heronry generate --adapter",
}
METAVARS = {str: "TEXT", int: "N", float: "X", Path: "PATH"}  # what stands for a value in the help
UNKNOWN = re.compile(r"No such (option|command):? '?([^\s']+)'?")  # in typer's words
COMMANDS = (
    generate,
    chat,
    serve,
    pull,
    list_models,
    rm,
    info,
    quantize,
    merge,
    convert,
    eval,
    see,
    view,
    compare,
    data,
    train,
    bench,
)
COMMAND_NAMES = [function.__name__ for function in COMMANDS]
app = typer.Typer(
    help="RWKV, every generation: trained like a Transformer, run like an RNN.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Runs a command and exits; see the top of this file."""
    _open_standard_streams()
    try:
        with signals_raise():
            code = app(prog_name="heronry", standalone_mode=False)  # an exit code, where typer ended the command
            if code == 130:  # what typer makes of Ctrl-C
                raise KeyboardInterrupt
            sys.stdout.flush()
    except BaseException as error:
        code = _report(error)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException) -> int:
    """Says in one line what went wrong, and returns the exit code; an error of heronry's own is raised again."""
    code, line = 2, ""
    broken = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)  # typer exits then
    if isinstance(error, Terminated):
        code, line = int(error.code or 0), error.line
    elif broken:
        code = 141  # what a shell shows for a program that SIGPIPE ended
    elif isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        code, line = 130, "stopped"
    elif hasattr(error, "format_message"):  # of typer: a mistake in the options
        context, param = getattr(error, "ctx", None), getattr(error, "param", None)
        message = re.sub(r" \(env var: '\w+'\)", "", error.format_message().rstrip("."))
        help_of = "heronry" if context is None else context.command_path
        if context is not None and param is not None and (place := _place(context, param.name)) is not None:
            line = f"{message}; it comes from {place}"
        elif context is not None and (typed := UNKNOWN.match(message)) is not None:
            names = [name for x in context.command.params for name in x.opts] if typed[1] == "option" else COMMAND_NAMES
            close = get_close_matches(typed[2], names, n=1)
            hint = f"; did you mean {close[0]}? See" if close else "; see"
            line = f"{typed[0]}{hint} {help_of} --help"
        else:
            line = f"{message}; see {help_of} --help"
    elif (described := describe(error)) is not None:
        line = described
    else:
        raise error
    logging.getLogger("heronry").info("heronry: the error in full:", exc_info=error)
    try:
        sys.stdout.flush()
    except OSError:
        broken = True
    if broken:  # what is left in the buffer must not be tried again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if line:
        _print_error(line, new_line=code == 130)
    return code


def _print_error(line: str, new_line: bool = False) -> None:
    """new_line: a terminal shows "^C" at the beginning of this one."""
    try:
        if new_line and sys.stderr.isatty():
            print(file=sys.stderr)
        print("heronry: " + printable(" ".join(line.splitlines())), file=sys.stderr, flush=True)
    except OSError:  # there is nowhere to say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _open_standard_streams() -> None:
    """Closed streams become ones on which every access fails: else print() would do nothing, without an error, and the
    next file that is opened would get their number. Input that is not UTF-8 reaches the tokenizer, which reports it;
    what a terminal cannot show becomes "?"."""
    for number, (name, mode) in enumerate((("stdin", os.O_WRONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_RDONLY))):
        if getattr(sys, name) is None:
            file = os.open(os.devnull, mode)
            if file != number:
                os.dup2(file, number)
            raw = io.FileIO(number, "r" if name == "stdin" else "w", closefd=False)
            buffer = io.BufferedReader(raw) if name == "stdin" else io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding="utf-8", write_through=name == "stderr"))
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"  # of which UTF-8 is an extension
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"heronry {__version__}")
        raise typer.Exit


@app.callback()
def _begin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
    try:
        context.default_map = read_defaults()
    except (InputError, OSError) as error:  # until a command runs: its help comes anyway
        context.obj = error


def _with_verbosity(function: Callable[..., None]) -> Callable[..., None]:
    """The command with the options -v and -q; an argument that an error names is named as it is typed, and the place
    that it comes from if it was not typed."""
    verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen, and show errors in full.")]
    quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no notes, only errors.")]
    arguments = dict(inspect.signature(function).parameters)
    takes_context = arguments.pop("context", None) is not None

    @wraps(function)
    def run(context: typer.Context, verbose: bool, quiet: bool, **options: Any) -> None:
        log = logging.getLogger("heronry")
        log.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
        log.handlers = [logging.StreamHandler()]  # on the standard error of now
        if context.obj is not None:
            raise context.obj
        try:
            function(**options, **({"context": context} if takes_context else {}))
        except InputError as error:
            message = _as_typed(str(error), arguments)
            for name in [name for name in DEFAULTS if name in options]:
                place = _place(context, name)
                shown = options[name] if DEFAULTS[name] is str else f"--{name.replace('_', '-')} "
                if place is not None and str(shown) in message:
                    message += f" ({name} comes from {place})"
            raise InputError(message) from error

    hints = get_type_hints(function, include_extras=True)
    for name, hint in hints.items():  # Python 3.10 makes Optional[Annotated[...]] of what has the default None
        hints[name] = next((part for part in get_args(hint) if hasattr(part, "__metadata__")), hint)
    hints |= {"verbose": verbose, "quiet": quiet}
    hints["context"] = typer.Context
    for name, hint in hints.items():
        kinds = (hint, *_parts(hint))
        if name not in arguments:
            continue
        info = get_args(hint)[1]
        if Path in kinds:
            info.parser = path
        if info.metavar is None and bool not in kinds:
            is_argument = isinstance(info, typer.models.ArgumentInfo)
            info.metavar = name.upper() if is_argument else next(METAVARS[kind] for kind in kinds if kind in METAVARS)
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, keyword, default=False) for name in ("verbose", "quiet")]
    extra.append(inspect.Parameter("context", keyword))
    parameters = [x.replace(annotation=hints[x.name]) for x in (*arguments.values(), *extra)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


def path(text: str) -> Path:
    """A path as it is typed; an empty one, which Path would take for the current folder, is a mistake."""
    if not text:
        raise typer.BadParameter("a path must not be empty")
    return Path(text).expanduser()


def _parts(hint: Any) -> tuple[Any, ...]:
    """All that a type is made of."""
    parts = get_args(hint)
    return (*parts, *(x for part in parts for x in _parts(part)))


def _place(context: typer.Context, name: str) -> str | None:
    """Where the value of an option comes from that was not typed: a variable of the environment or a file."""
    source = context.get_parameter_source(name)
    if source is None or name not in DEFAULTS:
        return None
    return {"ENVIRONMENT": f"HERONRY_{name.upper()}", "DEFAULT_MAP": str(config_file())}.get(source.name)


def _as_typed(message: str, arguments: Collection[str]) -> str:
    """A message of the library in the words of the command line: "--max-tokens must be", "supply one with
    --tokenizer", and without what only Python can do."""
    message = re.sub(r"; load it with kind=\w+", "", message)
    for name in arguments:
        option = "--" + name.replace("_", "-")
        message = re.sub(rf"^{name}(?= must | has )|(?<![\w-]){name}=(?![\w/])", option, message)
    for option, elsewhere in ELSEWHERE.items():
        if (name := option.removeprefix("--")) not in arguments:
            message = re.sub(
                rf"(?<![\w-])(?:{name}= or {option}|{option}|{name}=)(?![\w/-])", f"`{elsewhere}`", message
            )
    return re.sub(r"(--[\w-]+) (?:\(\1\)|or \1)", r"\1", message)  # both names were given


class Command(TyperCommand):
    """A command whose help shows what is typed, without the braces and Python types that typer adds to arguments."""

    def get_help(self, ctx: typer.Context) -> str:  # type: ignore[override]  # of a class that typer keeps to itself
        usage, rest = super().get_help(ctx).split("\n\n", 1)
        usage = re.sub(r"\{(.*?)(?:\.\.\.)?\}(\.\.\.)?", r"\1\2", usage, flags=re.DOTALL)
        return usage + "\n\n" + re.sub(r"^(  \S.*?) <(list)?.*?>", _without_type, rest, flags=re.MULTILINE)


def _without_type(found: re.Match[str]) -> str:
    name = found[1] + ("..." if found[2] and not found[1].endswith("...") else "")
    return name.ljust(len(found[0]))


for function in COMMANDS:
    app.command(function.__name__, cls=Command)(_with_verbosity(function))
