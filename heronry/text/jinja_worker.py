"""Renders chat templates in a process of its own, which reads requests and writes answers, each a line of JSON.

A template from outside may loop for ever, or ask for all memory. Here that ends this process, and only its render. The
file runs as a script, so that nothing but Jinja is loaded.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_MEMORY = 2 << 30  # bytes of address space
MOST_TEXT = 64 << 20  # characters of a rendered conversation
MOST_REASON = 300  # characters of an error


class GenerationBlocks(Extension):
    """{% generation %} ... {% endgeneration %} around what the model writes; `mark` is put at both ends."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.mark = ""

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{self.mark}{caller()}{self.mark}"


class PublicNamespace(Namespace):
    """A namespace in which no name begins with an underscore: those lead into Python."""

    def __init__(self, *args: Any, **attributes: Any):
        super().__init__()
        for name, value in dict(*args, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"the name {name!r} is not allowed")
        super().__setitem__(name, value)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers has it for chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "namespace": PublicNamespace}
    return made


@lru_cache(8)
def compiled(source: str) -> tuple[jinja2.Template, GenerationBlocks]:
    env = environment()
    for node in env.parse(source).find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise jinja2.TemplateSyntaxError("a chat template cannot read other files", node.lineno)
    return env.from_string(source), env.extensions[GenerationBlocks.identifier]  # type: ignore[return-value]


def render(source: str, mark: str, variables: dict[str, Any]) -> str:
    template, blocks = compiled(source)
    blocks.mark = mark
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_TEXT:
            raise jinja2.TemplateError(f"writes more than {MOST_TEXT:,} characters")
    return "".join(pieces)


def answer(source: str, mark: str, variables: list[dict[str, Any]]) -> dict[str, Any]:
    """{"texts"}, or {"error"} in one line."""
    try:
        return {"texts": [render(source, mark, x) for x in variables]}
    except MemoryError:
        return {"error": "needs too much memory"}
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    return {"error": reason if len(reason) <= MOST_REASON else reason[:MOST_REASON] + " ..."}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who waits for the answer
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(**json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
