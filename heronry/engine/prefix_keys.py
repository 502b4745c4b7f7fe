"""What a kept state of a prompt's beginning is found by: everything that its numbers depend on, and the tokens read.

A key is a chain of hashes over the cells of the grid (see call_sizes.py), so a prompt of n cells has n keys, and two
prompts share those of the cells that they share. Never text: where a token ends depends on what follows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .. import __version__, build
from ..models import Model, State
from .call_sizes import choose_call_sizes

LAST_BORDERS = 2  # of a conversation: behind the last answer and behind the last message


class CacheRoot(NamedTuple):
    """Where the keys of a model begin, and the distance between its cuts in tokens."""

    digest: bytes
    grid: int


def model_identity(model: Model, initial: State | None = None) -> str:
    """64 hex digits for the model, its precision and the state that its texts begin from: a state stands for what was
    read only together with these. The same on every machine, and of every version.

    initial: one row, what texts begin from in place of the model's own initial state.
    """
    numbers = hashlib.sha256()  # the fingerprint does not say which state a tuned model begins from
    for name, x in (model.initial_state() if initial is None else initial).to_tensors().items():
        numbers.update(f"{name} {x.dtype} {list(x.shape)}".encode() + x.numpy().tobytes())
    parts = [model.fingerprint, str(model.dtype), model.quantization, numbers.hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_root(model: Model, initial: State | None = None, salt: str = "") -> CacheRoot:
    """To be computed once for each model, initial state and salt.

    Args:
        initial: see `model_identity`.
        salt: of a tenant; what is kept under one salt is never found under another.
    """
    sizes = choose_call_sizes(model)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else build.best_level()
    parts = {
        "model": model_identity(model, initial),
        "calls": repr(sizes),
        "native": model.usable_native_step() is not None,
        "device": [model.device.type, device, torch.backends.cpu.get_cpu_capability(), sys.platform],
        "versions": [__version__, torch.__version__],
        "salt": salt,
    }
    return CacheRoot(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest(), sizes.grid)


def prefix_keys(root: CacheRoot, tokens: Sequence[int]) -> list[str]:
    """One key for every whole cell of the tokens: that of the first cell, of the first two, ... 64 hex digits each."""
    digest, grid = root
    cells = len(tokens) // grid
    data = np.asarray(tokens[: cells * grid], dtype="<i8").tobytes()
    keys = []
    for i in range(cells):
        digest = hashlib.sha256(digest + data[i * grid * 8 : (i + 1) * grid * 8]).digest()
        keys.append(digest.hex())
    return keys


def choose_cuts(length: int, grid: int, borders: Iterable[int], start: int, shared: int) -> list[int]:
    """Where to cut a prompt, so that its states there may be kept: a handful of positions on the grid, in order.

    The last ones before the first border (behind the system prompt), before the last ones (an edit of the last message,
    tool loops) and before the end; and where the prompt leaves what an earlier one has read.

    Args:
        length: of the prompt, in tokens.
        borders: numbers of tokens after which a message ends.
        start: so many tokens need not be read; nothing is cut there or before.
        shared: as many tokens as an earlier prompt began with.
    """
    inside = sorted(x for x in borders if 0 < x < length)
    wanted = [*inside[:1], *inside[-LAST_BORDERS:], length - 1, min(shared, length - 1)]
    return sorted({x // grid * grid for x in wanted if x // grid * grid > start})
