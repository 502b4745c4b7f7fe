"""States in RAM by key, those used last, bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from ..models import State


class StateMemory:
    """May be used from any thread. A state that is in use when it is evicted stays with its users."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._states: OrderedDict[str, State] = OrderedDict()  # the least recently used first
        self._nbytes = 0
        self.evicted = 0  # states so far, for want of room
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        """Of all states."""
        return self._nbytes

    def get(self, key: str) -> State | None:
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def put(self, key: str, state: State) -> None:
        """Keeps the state and drops the least recently used ones; itself, if it alone is too large."""
        size = state.nbytes
        if size > self._max_bytes:
            self.drop(key)
            return
        with self._lock:
            self._drop(key)
            self._states[key] = state
            self._nbytes += size
            while self._nbytes > self._max_bytes:
                self._drop(next(iter(self._states)))
                self.evicted += 1

    def drop(self, key: str) -> None:
        """Forgets a state, if it is there."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        state = self._states.pop(key, None)
        if state is not None:
            self._nbytes -= state.nbytes
