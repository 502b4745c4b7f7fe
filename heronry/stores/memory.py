"""States in RAM, for servers without a folder: they end with the process."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from .store import MAX_ABOUT_BYTES, Entry, Key, StateStore


@dataclass(frozen=True)
class _Held:
    """place: of its bytes; "" = they are gone."""

    entry: Entry
    place: str
    about_size: int


class MemoryStore(StateStore):
    """See `StateStore`."""

    def __init__(self, max_bytes: int, max_about_bytes: int = MAX_ABOUT_BYTES):
        """As of `DiskStore`."""
        super().__init__("RAM", ())
        self._max_bytes, self._max_about_bytes = max_bytes, max_about_bytes
        self._held: OrderedDict[Key, _Held] = OrderedDict()  # the least recently used first
        self._data: dict[str, bytes] = {}  # by place
        self._nbytes = self._about_bytes = 0
        self._places = count()
        self._lock = threading.RLock()

    def put(self, key: Key, data: bytes, about: Mapping[str, Any] | None = None) -> bool:
        text = json.dumps(dict(about)) if about else ""
        if not (data or text) or len(data) > self._max_bytes or len(text) > self._max_about_bytes:
            return False
        now = time.time()
        digest = hashlib.sha256(data).hexdigest() if data else ""
        entry = Entry(key, json.loads(text or "{}"), len(data), digest, now, now)
        with self._lock:
            self.delete(key)
            place = f"place {next(self._places)}" if data else ""
            self._held[key] = _Held(entry, place, len(text))
            if data:
                self._data[place] = data
            self._nbytes += len(data)
            self._about_bytes += len(text)
            for old in list(self._held):
                if self._nbytes <= self._max_bytes:
                    break
                self._drop_data(old, self._held[old].place)
            for old, held in list(self._held.items()):
                if self._about_bytes <= self._max_about_bytes:
                    break
                if held.about_size:
                    self.delete(old)
        return True

    def present(self, keys: Iterable[Key]) -> set[Key]:
        with self._lock:
            return {key for key in keys if key in self._held and self._held[key].place}

    def entries(self, kind: str, tenant: str, limit: int = 1000) -> list[Entry]:
        with self._lock:
            every = [held.entry for held in reversed(self._held.values())]
        return [entry for entry in every if (entry.key.kind, entry.key.tenant) == (kind, tenant)][:limit]

    def delete(self, key: Key) -> bool:
        with self._lock:
            held = self._held.pop(key, None)
            if held is None:
                return False
            self._about_bytes -= held.about_size
            self._nbytes -= len(self._data.pop(held.place, b""))
            return True

    def expire(self, kind: str, data_before: float, about_before: float) -> None:
        with self._lock:
            for key, held in list(self._held.items()):
                if key.kind == kind and held.entry.used < about_before:
                    self.delete(key)
                elif key.kind == kind and held.entry.used < data_before:
                    self._drop_data(key, held.place)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def close(self) -> None:
        pass

    def _find(self, key: Key) -> tuple[Entry, str] | None:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return None
            self._held[key] = replace(held, entry=replace(held.entry, used=time.time()))
            self._held.move_to_end(key)
            return held.entry, held.place

    def _read(self, place: str) -> bytes | None:
        return self._data.get(place)

    def _drop_data(self, key: Key, place: str) -> bool:
        with self._lock:
            held = self._held.get(key)
            if held is None or not place or held.place != place:
                return False
            self._nbytes -= len(self._data.pop(place))
            if held.about_size:
                self._held[key] = replace(held, entry=replace(held.entry, size=0, digest=""), place="")
            else:
                self.delete(key)
            return True
