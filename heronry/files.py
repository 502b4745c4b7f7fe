"""Atomic writes, where there is space for them, and who else writes there; JSON files; hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
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
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with naming(typed, part), _folder(path.parent, typed):
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask, as open() does
            mode = part.stat().st_mode
            yield part
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            if path.exists():
                mode = path.stat().st_mode
            os.chmod(part, mode & 0o777)  # libraries that replace the file make it their user's alone
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _folder(path: Path, typed: str | Path) -> Iterator[None]:
    """The folder is there in the block; after it, only if something is in it or it was there before. typed: the name in
    the error if there is a file in its place."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(typed)) from error
        yield
    finally:
        with suppress(OSError):  # something is in it
            for folder in missing:
                folder.rmdir()


def check_writable(path: Path) -> None:
    """OSError, with the name, if there is a file at `path` that cannot be written, or none and none can be created."""
    if path.exists():
        with naming(path), open(path, "ab"):
            return
    with suppress(_NotWritten), atomic_write(path):
        raise _NotWritten


class _NotWritten(Exception):
    """The end of an attempt."""


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


@contextmanager
def only_process(path: Path, message: str) -> Iterator[None]:
    """One process at a time is in the block, where the system and the disk can do that; InputError for another one.

    path: a file that is there meanwhile; one that a process left when it was killed locks nobody out.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with _folder(path.parent, path.parent):
        while True:
            with naming(path.parent, path):
                file = open(path, "ab")  # noqa: SIM115  closed where the lock ends
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked processes do not inherit it, unlike flock's
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    file.close()
                    raise InputError(message) from error
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()  # it was deleted by its last owner just now
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()


def check_free_space(size: int, path: Path) -> None:
    """InputError if the disk of `path` has fewer than `size` bytes left."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{path}: needs {size / 1e6:,.1f} MB, but {folder} has only {free // 10**6:,} MB left")


def data_folder() -> Path:
    """Where what belongs to the user is kept: $XDG_DATA_HOME/heronry, or ~/.local/share/heronry.

    Raises:
        InputError: there is no home directory.
    """
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "heronry"
    except RuntimeError as error:
        raise InputError("there is no home directory: set XDG_DATA_HOME") from error


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
