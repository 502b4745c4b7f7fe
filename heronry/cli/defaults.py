"""Defaults of a user for options: config.toml in $XDG_CONFIG_HOME/heronry or ~/.config/heronry.

    model = "g1-1.5b"
    threads = 4

An option on the command line comes first, then HERONRY_MODEL, HERONRY_DTYPE, ... in the environment, then this file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown_name

TYPES: dict[str, type] = {
    **dict.fromkeys(("model", "dtype", "device"), str),
    **dict.fromkeys(("threads", "max_tokens"), int),
    **dict.fromkeys(("temperature", "top_p"), float),
}
COMMANDS = {  # which of them a command takes
    "generate": tuple(TYPES),
    "chat": tuple(TYPES),
    "eval": ("model", "dtype", "device", "threads"),
    "info": ("model",),
    "see": ("dtype", "device", "threads"),
}


def config_file() -> Path | None:
    """Where the file is looked for; None without a home directory."""
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError:
        return None
    return folder / "heronry" / "config.toml"


def read_defaults() -> dict[str, dict[str, Any]]:
    """The defaults that the file gives, by command; {} without one.

    Raises:
        InputError: it is no TOML, or has another key or a value of another type.
    """
    file = config_file()
    if file is None or not os.path.isfile(file):  # nor is there one in a home directory that cannot be entered
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise InputError(f"{file}: not a TOML file ({error})") from error
    for name, value in values.items():
        if name not in TYPES:
            raise InputError(f"{file}: {unknown_name('setting', name, TYPES)}")
        if type(value) is not TYPES[name] and (type(value), TYPES[name]) != (int, float):
            kind = {str: "a text", int: "a whole number", float: "a number"}[TYPES[name]]
            raise InputError(f"{file}: {name} must be {kind}, got {value!r}")
    return {command: {name: values[name] for name in names if name in values} for command, names in COMMANDS.items()}
