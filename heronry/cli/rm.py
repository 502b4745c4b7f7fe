"""`heronry rm`: a downloaded model, deleted."""

from __future__ import annotations

from typing import Annotated

import typer

from . import complete


def rm(
    name: Annotated[
        str,
        typer.Argument(help="The name of a downloaded model in `heronry list`.", autocompletion=complete.downloaded),
    ],
) -> None:
    """Delete a downloaded model."""
    import shutil

    from .. import catalog
    from ..errors import InputError

    path = catalog.downloaded().get(name)
    if path is None:
        raise InputError(f"{name}: no such model in {catalog.models_folder()}; `heronry list` shows what is there")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
