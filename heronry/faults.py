"""Errors of the world in a line: what is wrong outside of heronry."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InputError

# torch's, C++'s and the dynamic linker's words for one thing
NO_MEMORY = re.compile(
    r"can't allocate|cannot allocate|not enough memory|out of memory|bad_alloc|can't start new thread|"
    r"failed to map segment",
    re.IGNORECASE,
)
PLAIN = {  # instead of the system's words
    errno.EBADF: "standard input or output is closed",
    errno.EEXIST: "is a file, not a folder",
}
EXTRAS = {  # of heronry, by the package that they bring
    **dict.fromkeys(("typer", "rich", "prompt_toolkit"), "cli"),
    **dict.fromkeys(("accelerate", "tensorboard", "pyarrow", "peft"), "train"),
    **dict.fromkeys(("PIL", "kornia", "datasets"), "vision"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    **dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "redis"), "serve"),
    "gguf": "convert",
    "llguidance": "serve",
    "ray": "cluster",
    "transformers": "transformers",
}


def describe(error: BaseException) -> str | None:
    """One line for what is wrong with input, disk, permissions, memory or the installation; None for an error that is
    heronry's own."""
    if isinstance(error, InputError):
        line = str(error)
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        line = "there is not enough memory"
    elif isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("heronry"):
        package = str(error.name).partition(".")[0]
        install = f"heronry[{EXTRAS[package]}]" if package in EXTRAS else package
        line = f"this needs the package {package}: pip install '{install}'"
    elif isinstance(error, RuntimeError) and "home directory" in str(error):
        line = "there is no such home directory; write the path without ~"
    elif isinstance(error, ValueError) and "null byte" in str(error):
        line = "the name of a file must not contain a NUL character"
    elif isinstance(error, OSError) and error.errno is not None:
        reason = PLAIN.get(error.errno, os.strerror(error.errno))
        line = f"{error.filename}: {reason}" if error.filename is not None else reason
    else:
        return None
    return " ".join(line.splitlines())


@contextmanager
def exit_with_a_line() -> Iterator[None]:
    """Around the main function of a module: what `describe` knows ends the process with that line on standard error and
    exit code 2, Ctrl-C with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("heronry: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (line := describe(error)) is None:
            raise
        print(f"heronry: {line}", file=sys.stderr)
        sys.exit(2)
