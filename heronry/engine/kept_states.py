"""States that have names: of responses, sessions, uploads. Any state may be kept here, also one that decoding left: who
names it continues it, whatever its bits.

What it stands for (`about`: items, text) is kept longer than the state: one that is gone can be read again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..models import State
from ..stores.store import Entry, Key, StateStore
from .state_memory import StateMemory

log = logging.getLogger("heronry")


class Kept(NamedTuple):
    """What is known of a state, and the state, on the CPU; None if it is gone."""

    entry: Entry
    state: State | None


def new_name(prefix: str) -> str:
    """A name that nobody can guess: the prefix and 128 random bits."""
    return f"{prefix}_{secrets.token_hex(16)}"


class KeptStates:
    """May be used from any thread. Servers with the same store share them. Each tenant (`Key.tenant`) sees its own."""

    def __init__(self, store: StateStore, ram_bytes: int = 0):
        """ram_bytes: of states that are kept in RAM as well."""
        self.store = store
        self._memory = StateMemory(ram_bytes)  # by digest: another server may change what a name stands for

    def put(self, key: Key, state: State | None, about: Mapping[str, Any] | None = None) -> bool:
        """Keeps a state under a name, in place of what had it. False if it cannot be kept; once it returns True the
        state outlives this process. None = there is none, and only what is known is kept."""
        return self.store.put(key, b"" if state is None else state.to_bytes(), about)

    def get(self, key: Key) -> Kept | None:
        """None where nothing is known, also while the store cannot be read: see `StateStore.is_readable`."""
        entry = self.store.get(key, with_data=False)
        if entry is not None and entry.size:
            state = self._memory.get(entry.digest)
            if state is not None:
                return Kept(entry, state)
            entry = self.store.get(key)
        if entry is None:
            return None
        state = read_state(entry)
        if state is not None:
            self._memory.put(entry.digest, state)
        return Kept(entry, state)


def read_state(entry: Entry) -> State | None:
    """The state in an entry's bytes; None if they are gone, or are none that this version can read."""
    try:
        return None if entry.data is None else State.from_bytes(entry.data)
    except InputError as error:
        log.warning("%s is of no use: %s", entry.key, error)
        return None
