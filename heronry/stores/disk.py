"""States in a folder: a safetensors file each, under a name that is drawn, and an SQLite index that says what they are.

- a file is complete on the disk before the index names it, and the index forgets a file before it is deleted: a process
  may be killed at any moment. What it leaves, files without an entry, is removed later
- the index is in WAL mode: many processes of one machine may read and write. A folder on a network needs RedisStore
- after a power cut the last entries may be missing; none is wrong
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import atomic_write, check_writable, naming
from .store import MAX_ABOUT_BYTES, Entry, Key, StateStore

INDEX = "index.sqlite"
SUFFIX = ".safetensors"
VERSION = 1  # of the index
WAIT = 30  # seconds for other processes
GRACE = 600  # seconds after which a file without an entry is nobody's

# used: nanoseconds since 1970, or one more than the largest: no two are alike
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, tenant TEXT NOT NULL, file TEXT NOT NULL, size INTEGER NOT NULL,
    digest TEXT NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL, about_size INTEGER NOT NULL,
    about TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
CREATE INDEX IF NOT EXISTS by_use_with_data ON entries (used) WHERE size > 0;
CREATE INDEX IF NOT EXISTS by_owner ON entries (kind, tenant, used);
CREATE INDEX IF NOT EXISTS sizes ON entries (size, about_size);
PRAGMA user_version = {VERSION};
"""
COLUMNS = "id, file, size, digest, created, used, about"
NOW = "max(CAST(? AS INTEGER), (SELECT coalesce(max(used), 0) + 1 FROM entries))"


class DiskStore(StateStore):
    """See `StateStore`."""

    def __init__(self, folder: str | Path, max_bytes: int, max_about_bytes: int = MAX_ABOUT_BYTES):
        """
        Args:
            folder: created if it is not there; nothing else should be in it.
            max_bytes: of all files together.
            max_about_bytes: of what is known about them, and about those that are gone.

        Raises:
            InputError: the index is damaged, or of another version.
            OSError: the folder cannot be written.
        """
        self._folder = Path(folder).expanduser().resolve()
        super().__init__(str(self._folder), (OSError, sqlite3.Error, ValueError))
        self._max_bytes, self._max_about_bytes = max_bytes, max_about_bytes
        self._lock = threading.RLock()  # of the connection
        index = self._folder / INDEX
        check_writable(index)
        with naming(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(index, timeout=WAIT, isolation_level=None, check_same_thread=False)
            self._open_index()
        except sqlite3.Error as error:
            raise InputError(f"{index}: cannot be opened ({error}); another folder can be used instead") from error
        self._remove_leftovers()

    def _open_index(self) -> None:
        end = time.monotonic() + WAIT
        while True:  # SQLite does not wait for the others that do this at the same time
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            [[version]] = self._db.execute("PRAGMA user_version")
            if version not in (0, VERSION):
                raise InputError(f"{self._folder}: was written by another version of heronry; choose another folder")
            if version == 0:
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """The block is done as a whole or not at all."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _query(self, sql: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def put(self, key: Key, data: bytes, about: Mapping[str, Any] | None = None) -> bool:
        text = json.dumps(dict(about)) if about else ""
        if not (data or text) or len(data) > self._max_bytes or len(text) > self._max_about_bytes:
            return False
        digest = hashlib.sha256(data).hexdigest() if data else ""
        files = [self._folder / f"{secrets.token_hex(16)}{SUFFIX}"] if data else []
        with self._writing:
            for file in files:
                with atomic_write(file) as part:
                    part.write_bytes(data)
            try:
                with self._transaction():
                    for needed in (*files, self._folder / INDEX):  # a leftover to another process; a deleted folder
                        needed.stat()
                    now = time.time_ns()
                    gone = self._query("SELECT file FROM entries WHERE id = ?", str(key))
                    name = files[0].name if files else ""
                    row = (str(key), key.kind, key.tenant, name, len(data), digest, now, now, len(text), text)
                    self._query(f"INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, {NOW}, ?, ?)", *row)
                    gone += self._make_room()
            except BaseException:
                for file in files:
                    file.unlink(missing_ok=True)
                raise
            self._unlink(gone)
            return True
        return False

    def _make_room(self) -> list[Any]:
        """Within a transaction; returns the files to delete after it."""
        gone: list[Any] = []
        [[size, about_size]] = self._query("SELECT sum(size), sum(about_size) FROM entries")
        while size > self._max_bytes:
            [[used, file, freed]] = self._query(
                "SELECT used, file, size FROM entries WHERE size > 0 ORDER BY used LIMIT 1"
            )
            gone.append((file,))
            size -= freed
            self._forget_data("used = ?", used)
        while about_size > self._max_about_bytes:
            [[used, file, freed]] = self._query(
                "SELECT used, file, about_size FROM entries WHERE about_size > 0 ORDER BY used LIMIT 1"
            )
            gone.append((file,))
            about_size -= freed
            self._query("DELETE FROM entries WHERE used = ?", used)
        return gone

    def _forget_data(self, which: str, *values: Any) -> None:
        """Within a transaction; of entries about which nothing is known, nothing is left."""
        self._query(f"DELETE FROM entries WHERE {which} AND about_size = 0", *values)
        self._query(f"UPDATE entries SET size = 0, file = '', digest = '' WHERE {which}", *values)

    def _unlink(self, rows: Iterable[tuple[str]]) -> None:
        for [file] in rows:
            with suppress(OSError):  # as on Windows while another process reads it: a leftover
                if file:
                    (self._folder / file).unlink(missing_ok=True)

    def present(self, keys: Iterable[Key]) -> set[Key]:
        wanted = {str(key): key for key in keys}
        with self._reading:
            sql = "SELECT entries.id FROM json_each(?) JOIN entries ON entries.id = value WHERE size > 0"
            return {wanted[name] for [name] in self._query(sql, json.dumps([*wanted]))}
        return set()

    def entries(self, kind: str, tenant: str, limit: int = 1000) -> list[Entry]:
        with self._reading:
            sql = f"SELECT {COLUMNS} FROM entries WHERE kind = ? AND tenant = ? ORDER BY used DESC LIMIT ?"
            return [_entry(row) for row in self._query(sql, kind, tenant, limit)]
        return []

    def delete(self, key: Key) -> bool:
        with self._removing:
            with self._transaction():
                gone = self._query("SELECT file FROM entries WHERE id = ?", str(key))
                self._query("DELETE FROM entries WHERE id = ?", str(key))
            self._unlink(gone)
            return bool(gone)
        return False

    def expire(self, kind: str, data_before: float, about_before: float) -> None:
        data, about = int(max(data_before, about_before) * 1e9), int(about_before * 1e9)
        with self._removing:
            with self._transaction():
                old = "kind = ? AND used < ? AND size > 0"
                gone = self._query(f"SELECT file FROM entries WHERE {old}", kind, data)
                self._forget_data(old, kind, data)
                self._query("DELETE FROM entries WHERE kind = ? AND used < ?", kind, about)
            self._unlink(gone)
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Files without an entry that nobody can be writing any more."""
        with self._removing, self._transaction():
            known = {file for [file] in self._query("SELECT file FROM entries WHERE size > 0")}
            for file in self._folder.iterdir():
                if file.suffix in (SUFFIX, ".part") and file.name not in known:
                    with suppress(OSError):
                        if file.stat().st_mtime < time.time() - GRACE:
                            file.unlink()

    @property
    def nbytes(self) -> int:
        with self._reading:
            return int(self._query("SELECT coalesce(sum(size), 0) FROM entries")[0][0])
        return 0

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _find(self, key: Key) -> tuple[Entry, str] | None:
        rows = self._query(f"SELECT {COLUMNS} FROM entries WHERE id = ?", str(key))
        if not rows:
            return None
        with suppress(sqlite3.Error):  # a full disk can still be read
            self._query(f"UPDATE entries SET used = {NOW} WHERE id = ?", time.time_ns(), str(key))
        return _entry(rows[0]), rows[0][1]

    def _read(self, place: str) -> bytes | None:
        try:
            return (self._folder / place).read_bytes()
        except FileNotFoundError:
            return None

    def _drop_data(self, key: Key, place: str) -> bool:
        with self._transaction():
            found = self._query("SELECT file FROM entries WHERE id = ? AND file = ?", str(key), place)
            self._forget_data("id = ? AND file = ?", str(key), place)
        self._unlink(found)
        return bool(found)


def _entry(row: tuple[Any, ...]) -> Entry:
    name, _, size, digest, created, used, about = row
    return Entry(Key.parse(name), json.loads(about or "{}"), size, digest, created / 1e9, used / 1e9)
