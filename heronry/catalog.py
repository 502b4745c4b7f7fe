"""Models by short names: the bundled one, those in the default folder, and a table of published checkpoints.

The table, published.json, works without a network: names, files on the hub, numbers of parameters, the length of the
texts that a model was trained on (its context, which is no limit), and licenses.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from .errors import InputError
from .files import data_folder

BUNDLED = Path(__file__).parent / "bundled"
RUNTIME = 400_000_000  # bytes that Python and PyTorch take beside a model


@dataclass(frozen=True)
class Published:
    """A checkpoint on the hub: a .pth in bfloat16 for the World vocabulary."""

    name: str
    repository: str
    file: str
    generation: str
    parameters: int
    context: int  # tokens
    license: str

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return 2 * self.parameters

    @property
    def memory(self) -> int:
        """Bytes that a process with it takes, about."""
        return self.size + RUNTIME


BUNDLED_MODEL = Published("bundled", "", "", "rwkv7", 3_819_456, 1024, "Apache-2.0")


@cache
def published() -> dict[str, Published]:
    """The table, by short name."""
    rows = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    return {row["name"]: Published(**row) for row in rows}


def models_folder() -> Path:
    """Where `heronry pull` keeps models; InputError where there is no home directory."""
    return data_folder() / "models"


def downloaded() -> dict[str, Path]:
    """What is in the default folder, by short name: that of the table, else the name of the file without its suffix, or
    of the folder."""
    folder = models_folder()
    short = {model.file: name for name, model in published().items()}
    files = sorted(path for path in folder.iterdir() if path.name[0] != ".") if os.path.isdir(folder) else []
    return {short.get(path.name, path.name if path.is_dir() else path.stem): path for path in files}


def find(name: str | Path) -> Path | None:
    """The path of the model with a short name: "bundled", or one in the default folder; None for all that is no short
    name. A local path of the same name comes first, except for "bundled".

    Raises:
        InputError: the model is published, but not downloaded.
    """
    name = str(name)
    if name == "bundled":
        return BUNDLED
    if os.sep in name or "/" in name or os.path.exists(name):
        return None
    try:
        local = downloaded().get(name)
    except InputError:
        local = None
    if local is None and name in published():
        size = published()[name].size / 1e9
        raise InputError(f"{name}: not downloaded yet; `heronry pull {name}` does it ({size:.1f} GB)")
    return local


def hint(name: str) -> str:
    """What to say of a name that is neither a short name nor a file, after "no such file or folder"."""
    if os.sep in name or "/" in name:
        return ""
    known = ["bundled", *published()]
    with suppress(InputError):
        known += downloaded()
    if close := get_close_matches(name, known, n=1):
        return f"; did you mean {close[0]}? `heronry list` shows the short names of models"
    return "" if "." in name else "; `heronry list` shows the short names of models"
