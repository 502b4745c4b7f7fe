"""Writes states to a store in a thread of its own, so that the one that runs the model never waits for a disk."""

from __future__ import annotations

import logging
import threading
import time

from ..models import State
from ..stores.store import Key, StateStore

log = logging.getLogger("heronry")


class StateWriter:
    """States wait here, found by `get`, until they are written. What the store is too slow for is left out."""

    def __init__(self, store: StateStore, max_bytes: int):
        """max_bytes: of states that wait; one may always."""
        self._store = store
        self._max_bytes = max_bytes
        self._pending: dict[Key, State] = {}  # the first is being written
        self._nbytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="heronry states", daemon=True)
        self._thread.start()

    def get(self, key: Key) -> State | None:
        """A state that waits."""
        return self._pending.get(key)

    def submit(self, key: Key, state: State) -> bool:
        """Returns at once; False if the state will not be written. One that is in the store already counts as used."""
        with self._changed:
            if key in self._pending:
                return True
            if self._closed or (self._pending and self._nbytes + state.nbytes > self._max_bytes):
                return False
            self._pending[key] = state
            self._nbytes += state.nbytes
            self._changed.notify_all()
            return True

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until nothing waits; False if that takes more seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout)

    def close(self, timeout: float = 60) -> None:
        """Writes what waits, for so many seconds at most, and takes nothing more."""
        end = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(max(0, end - time.monotonic()))
        if self._thread.is_alive():
            log.warning("%d states were not written before the end", len(self._pending))

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                key, state = next(iter(self._pending.items()))
            try:
                entry = self._store.get(key, with_data=False)
                if entry is None:
                    self._store.put(key, state.to_bytes())
            except Exception:  # this state is lost, the next ones should not be
                log.exception("%s could not be stored", key)
            with self._changed:
                del self._pending[key]
                self._nbytes -= state.nbytes
                self._changed.notify_all()
