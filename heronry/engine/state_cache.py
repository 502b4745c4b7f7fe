"""Keeps the states of prompts' beginnings, so that what was read once need not be read again.

- only states that prefill left on the grid of call_sizes.py are put here: with one of them a prompt gives the same
  bits as without, on the devices of which that file knows it. States that decoding left never are; see kept_states.py
- the longest known beginning counts; the last token of a prompt is always read, for its logits
- in RAM, and behind it in a store (stores/store.py) that outlives the process and may serve several of them
- nothing here fails: what cannot be kept, read or trusted is read again by the model
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..models import State
from ..stores.store import Key, StateStore
from .kept_states import read_state
from .prefix_keys import CacheRoot, choose_cuts, prefix_keys
from .state_memory import StateMemory
from .state_writer import StateWriter

KIND = "prefix"  # of the entries in the store
MAX_PENDING = 512 << 20  # bytes of states that wait to be stored
SEEN = 1 << 16  # cells whose keys are remembered without a state: some 15 MB


@dataclass(frozen=True)
class CacheStats:
    """What a `StateCache` did so far.

    hits, misses: prompts of which a beginning was known, and the others.
    cached_tokens, prompt_tokens: not read again, of so many.
    ram_bytes, store_bytes: of states, now.
    evicted: states that went from RAM for want of room.
    dropped: states that were not stored because the store was too slow.
    """

    hits: int = 0
    misses: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    ram_bytes: int = 0
    store_bytes: int = 0
    evicted: int = 0
    dropped: int = 0


class StateCache:
    """For any number of models, adapters, initial states and tenants: each has a root, see `cache_root`. Its methods
    may be called from any thread."""

    def __init__(self, ram_bytes: int, store: StateStore | None = None):
        """
        Args:
            ram_bytes: of states in RAM at most; 0 = only those that wait to be written, and the store.
            store: what is behind it; closed by its owner, after `close`.
        """
        self._memory = StateMemory(ram_bytes)
        self._store = store
        self._writer = None if store is None else StateWriter(store, MAX_PENDING)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._stats = CacheStats()

    def lookup(self, root: CacheRoot, tokens: Sequence[int]) -> tuple[int, State] | None:
        """The longest known beginning of a prompt: how many tokens it has, a multiple of the grid below len(tokens),
        and the state after them: one row, on the CPU. None where none is known.

        It may read from the store, which takes as long as a disk or a network does.
        """
        cells, state = self._find(prefix_keys(root, tokens[:-1]))
        cached = cells * root.grid
        with self._lock:
            now = self._stats
            self._stats = replace(
                now,
                hits=now.hits + (state is not None),
                misses=now.misses + (state is None),
                cached_tokens=now.cached_tokens + cached,
                prompt_tokens=now.prompt_tokens + len(tokens),
            )
        return None if state is None else (cached, state)

    def _find(self, names: Sequence[str]) -> tuple[int, State | None]:
        """How many cells the longest known one of these beginnings has, and its state."""
        keys = [Key(KIND, "", name) for name in names]
        known, state = 0, None
        for i in range(len(keys), 0, -1):
            state = self._memory.get(names[i - 1])
            if state is not None and self._writer is not None:
                self._writer.submit(keys[i - 1], state)  # what RAM answers for is in use in the store too
            elif self._writer is not None:
                state = self._writer.get(keys[i - 1])
            if state is not None:
                known = i
                break
        if self._store is None or known == len(keys):
            return known, state
        present = self._store.present(keys[known:])
        for i in range(len(keys), known, -1):
            entry = self._store.get(keys[i - 1]) if keys[i - 1] in present else None
            stored = None if entry is None else read_state(entry)
            if stored is not None:
                self._memory.put(names[i - 1], stored)
                return i, stored
        return known, state

    def cut_positions(
        self, root: CacheRoot, tokens: Sequence[int], borders: Iterable[int] = (), start: int = 0
    ) -> list[int]:
        """Where to cut a prompt and `put` its state: a handful of multiples of the grid above `start`, in order. To be
        called once for every prompt, since it is remembered: where the next one leaves it, that one is cut as well, and
        the third that begins alike finds a state there.

        Args:
            borders: numbers of tokens after which a message ends, where that is known.
            start: what `lookup` found.
        """
        keys = prefix_keys(root, tokens)
        with self._lock:
            shared = next((i for i in range(len(keys), 0, -1) if keys[i - 1] in self._seen), 0) * root.grid
            for key in reversed(keys):  # the beginnings, which are shared most, are forgotten last
                self._seen[key] = None
                self._seen.move_to_end(key)
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        return choose_cuts(len(tokens), root.grid, borders, start, shared)

    def put(self, root: CacheRoot, tokens: Sequence[int], position: int, state: State) -> None:
        """Keeps the state that prefill left after tokens[:position]; it is found at once, and written in the
        background.

        Args:
            position: a multiple of the grid.
            state: one row.
        """
        if position <= 0 or position % root.grid or position > len(tokens) or len(state) != 1:
            raise ValueError(f"a state of {len(state)} rows at token {position} of {len(tokens)} cannot be kept")
        name = prefix_keys(root, tokens[:position])[-1]
        state = state.compact().to("cpu")
        self._memory.put(name, state)
        if self._writer is not None and not self._writer.submit(Key(KIND, "", name), state):
            with self._lock:
                self._stats = replace(self._stats, dropped=self._stats.dropped + 1)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all states are in the store; False if that takes more seconds."""
        return self._writer is None or self._writer.flush(timeout)

    def expire(self, before: float) -> None:
        """Drops from the store what was last used before a time, in seconds since 1970."""
        if self._store is not None:
            self._store.expire(KIND, before, before)

    def close(self, timeout: float = 60) -> None:
        """Stores what is not stored yet, for so many seconds at most; after it nothing more is stored."""
        if self._writer is not None:
            self._writer.close(timeout)

    @property
    def stats(self) -> CacheStats:
        """What it did so far."""
        with self._lock:
            stats = replace(self._stats, ram_bytes=self._memory.nbytes, evicted=self._memory.evicted)
        return stats if self._store is None else replace(stats, store_bytes=self._store.nbytes)
