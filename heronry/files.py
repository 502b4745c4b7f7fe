"""Atomic writes, and where there is space for them; JSON files; hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` when the block ends without an error.

    A crash, a full disk or Ctrl-C leaves the old file as it was, and no new folder.
    """
    typed, path = path, Path(path).resolve()  # a link stays one
    if path.exists() and not path.is_file():
        raise InputError(f"{typed}: is not a file that could be replaced")
    missing = [folder for folder in path.parents if not folder.exists()]
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with naming(typed, part):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask, as open() does
            yield part
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            if path.exists():
                os.chmod(part, path.stat().st_mode & 0o777)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
            if not path.exists():
                with suppress(OSError):  # something else is in it by now
                    for folder in missing:
                        folder.rmdir()


@contextmanager
def naming(path: str | Path, part: Path | None = None) -> Iterator[None]:
    """An error of the system in the block is an OSError that names the file: that of a write has no name, and
    safetensors and torch hide it in errors of their own. part: a temporary file in its place, which nobody knows."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)
        raise
    except InputError:
        raise
    except Exception as error:
        if isinstance(cause := error.__context__, OSError) and cause.errno is not None:
            raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
        found = re.search(r"\((?:os error )?(\d{1,4})\)", str(error))
        if found is None or os.strerror(int(found[1])) not in str(error):  # else a number of another kind
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def check_free_space(size: int, path: Path) -> None:
    """InputError if the disk of `path` has fewer than `size` bytes left."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{path}: needs {size / 1e6:,.1f} MB, but {folder} has only {free // 10**6:,} MB left")


def hash_file(file: Path) -> str:
    """SHA-256, as hex digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8 with or without a byte order mark; InputError, with the file's name, if it
    cannot be read or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} is not a JSON object")
    return content
