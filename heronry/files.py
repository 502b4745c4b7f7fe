"""Atomic writes, and where there is space for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` when the block ends without an error.

    A crash, a full disk or Ctrl-C leaves the old file as it was.
    """
    path = Path(path).resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file that could be replaced")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(part, mode)  # mkstemp made it private; give it what open() would
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_free_space(size: int, path: Path) -> None:
    """InputError if the disk of `path` has fewer than `size` bytes left."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{path}: needs {size / 1e6:,.0f} MB, but {folder} has only {free / 1e6:,.0f} MB left")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
