"""A folder that appears when it is complete, and can be continued after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import check_folder_name
from ..errors import InputError


def check_new(target: Path) -> None:
    """InputError unless there is nothing at `target`, which is no file's name, or an empty folder."""
    check_folder_name(target)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target}: already exists; give the name of a new folder")


@contextmanager
def new_folder(target: Path, stamp: str) -> Iterator[Path]:
    """A folder beside `target` that is renamed to it when the block ends.

    After an interruption its files are kept for the next call with the same stamp; any other error removes them.
    """
    check_new(target)
    part = target.parent / f".{target.name}.part"
    journal = part / ".conversion.json"
    if part.exists() and (not journal.is_file() or journal.read_text() != stamp):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    journal.write_text(stamp)
    try:
        yield part
    except InputError as error:
        if not isinstance(error.__cause__, OSError):  # keep the files if the disk is full: it can be freed
            shutil.rmtree(part)
        raise
    journal.unlink()
    if target.exists():
        target.rmdir()
    part.rename(target)
