"""What stores of states have in common: DiskStore (disk.py) and RedisStore (redis.py).

A store holds named bytes, and beside them what is known about them, as JSON. Bytes go when there is no room for them,
those used least recently first; what is known about them stays longer. An entry about which nothing is known goes with
its bytes.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, ClassVar

from ..errors import InputError, show

log = logging.getLogger("heronry")

MAX_ABOUT_BYTES = 1 << 30  # the texts of some 100,000 conversations


@dataclass(frozen=True)
class Key:
    """The name of an entry. Whatever it is, it never becomes a path.

    kind: what it is, "response".
    tenant: whose it is; "" = nobody's. One tenant cannot name the entries of another.

    Raises:
        InputError: a part is longer than 128 characters or has others than letters, digits and `_.:@-`, a kind others
            than lower-case letters; or there is no kind or name.
    """

    kind: str
    tenant: str
    name: str

    PARTS: ClassVar = (("kind", "[a-z]{1,32}"), ("tenant", r"[\w.:@-]{0,128}"), ("name", r"[\w.:@-]{1,128}"))

    def __post_init__(self) -> None:
        for part, allowed in self.PARTS:
            value = getattr(self, part)
            if not isinstance(value, str) or not re.fullmatch(allowed, value, re.ASCII):
                raise InputError(
                    f"{show(value)} cannot be the {part} of a state: use 1 to 128 letters, digits and any of _ . : @ -"
                )

    def __str__(self) -> str:
        return f"{self.kind}/{self.tenant}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """Undoes `str`."""
        return cls(*text.split("/"))


@dataclass(frozen=True)
class Entry:
    """
    about: what is known about it, JSON.
    size: of its bytes; 0 = they are gone.
    digest: SHA-256 of its bytes; "" = they are gone.
    created, used: in seconds since 1970; when it was put, and last put or got.
    data: its bytes, where they were asked for and are there.
    """

    key: Key
    about: Mapping[str, Any]
    size: int
    digest: str
    created: float
    used: float
    data: bytes | None = field(default=None, repr=False)


class StateStore(ABC):
    """May be used from any thread, and by several processes at a time.

    A store that cannot be read is empty, and one that cannot be written refuses (`put` returns False); it says so once
    in the log, and goes on by itself when it can. Damaged bytes are removed and never returned.
    """

    def __init__(self, where: str, errors: tuple[type[Exception], ...]):
        """errors: those that mean that the store cannot be used."""
        self._where = where
        self._reading = Outage(f"{where} cannot be read", errors)
        self._writing = Outage(f"{where} cannot be written", errors)
        self._removing = Outage(f"{where}: nothing can be removed", errors)  # a full disk may allow it

    def get(self, key: Key, *, with_data: bool = True) -> Entry | None:
        """The entry, or None; without its bytes if they are gone."""
        with self._reading:
            while (found := self._find(key)) is not None:
                entry, place = found
                if not with_data or not place:
                    return entry
                data = self._read(place)
                if data is not None and hashlib.sha256(data).hexdigest() == entry.digest:
                    return replace(entry, data=data)
                if self._drop_data(key, place):  # else it was replaced meanwhile
                    log.warning("%s: %s was damaged and has been removed", self._where, key)
        return None

    @property
    def is_readable(self) -> bool:
        """Whether it could be read when that was tried last: if not, entries that it lacks may be there."""
        return not self._reading.is_failing

    @abstractmethod
    def put(self, key: Key, data: bytes, about: Mapping[str, Any] | None = None) -> bool:
        """Keeps bytes under a name, in place of what had it. Once it returns True they outlive this process. There may
        be none, if something is known about them."""

    @abstractmethod
    def present(self, keys: Iterable[Key]) -> set[Key]:
        """Those whose bytes are there, in one query."""

    @abstractmethod
    def entries(self, kind: str, tenant: str, limit: int = 1000) -> list[Entry]:
        """Without bytes, those used last, the latest first."""

    @abstractmethod
    def delete(self, key: Key) -> bool:
        """Forgets an entry; False if there was none."""

    @abstractmethod
    def expire(self, kind: str, data_before: float, about_before: float) -> None:
        """Of the entries of a kind, drops the bytes of those last used before a time, in seconds since 1970, and
        forgets those last used before another. To be called now and then: it also removes what killed processes left.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of all bytes, without what is known about them."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _find(self, key: Key) -> tuple[Entry, str] | None:
        """An entry without bytes, and where these are; "" if they are gone. Counts as use."""

    @abstractmethod
    def _read(self, place: str) -> bytes | None:
        """The bytes at a place, None if it is empty."""

    @abstractmethod
    def _drop_data(self, key: Key, place: str) -> bool:
        """Forgets the bytes of an entry if they are still at this place; False if they are not."""


class Outage:
    """A block that may fail for reasons outside: it ends without an error, and the log says so once, and once when it
    works again."""

    def __init__(self, what: str, errors: tuple[type[Exception], ...]):
        self._what = what
        self._errors = errors
        self.is_failing = False
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None and not isinstance(error, self._errors):
            return False
        with self._lock:
            was_failing, self.is_failing = self.is_failing, error is not None
        if self.is_failing and not was_failing:
            log.warning("%s (%s); states that are missing are computed again", self._what, error)
        elif was_failing and not self.is_failing:
            log.warning("%s: this is over", self._what)
        return error is not None
