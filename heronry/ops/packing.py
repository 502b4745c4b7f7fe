"""Packed sequences: their boundaries, and how a chunked body cuts them into padded chunks and joins them again.

A packed batch holds many sequences of any length in one row ([1, T, ...]); `cu_seqlens` marks where each
starts and ends: sequence s is `x[0, cu_seqlens[s]:cu_seqlens[s + 1]]`.

A chunked body wants rectangles instead. `Chunks` cuts every sequence into chunks of `length` tokens, padding
the last, and orders them by step: first the first chunk of every sequence, then the second of every sequence
that has one, and so on, longest sequences first. The state then advances one step at a time for all sequences
that are still alive, always a leading slice of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from operator import index

import torch
from torch import Tensor
from torch.nn import functional as F


def boundaries(cu_seqlens: Tensor | Sequence[int] | None, batch: int, tokens: int) -> tuple[int, ...] | None:
    """`cu_seqlens` as a checked tuple (0, ..., tokens), strictly increasing; None stays None."""
    if cu_seqlens is None:
        return None
    try:
        cu = tuple(index(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens))
    except TypeError:
        raise ValueError(f"cu_seqlens must be a list or 1-D tensor of integers, got {cu_seqlens}") from None
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row, but the batch has {batch} rows")
    if len(cu) < 2 or cu[0] != 0 or cu[-1] != tokens or any(a >= b for a, b in pairwise(cu)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to {tokens} with no empty sequence, got {list(cu[:8])}"
            + ("..." if len(cu) > 8 else "")
        )
    return cu


class Chunks:
    """Cuts [B, T, ...] into [M, length, ...] (M chunks of all sequences, step by step) and joins them again.

    alive[j] is the number of sequences that have a chunk j; `order` maps rows of the chunked state to the
    caller's sequences, None where they are the same.
    """

    def __init__(self, batch: int, tokens: int, cu: tuple[int, ...] | None, length: int):
        self.length = length
        self.shape = (batch, tokens)
        if cu is None:
            self.order: list[int] | None = None
            self.alive = [batch] * -(-tokens // length)
            return
        lengths = [end - start for start, end in pairwise(cu)]
        self.order = sorted(range(len(lengths)), key=lambda s: -lengths[s])
        steps = -(-max(lengths) // length)
        self.alive = [sum(n > j * length for n in lengths) for j in range(steps)]
        first = [0, *accumulate(self.alive)]  # where step j's chunks begin
        place = torch.empty(tokens, dtype=torch.long, device="cpu")  # token -> its row in the flattened chunks
        for row, s in enumerate(self.order):
            t = torch.arange(lengths[s], device="cpu")
            step_start = torch.tensor(first, device="cpu")[t // length]
            place[cu[s] : cu[s + 1]] = (step_start + row) * length + t % length
        self.place = place

    @staticmethod
    @lru_cache(maxsize=64)
    @torch.inference_mode(False)  # a cached object from inference must also serve a backward pass
    def cached(batch: int, tokens: int, cu: tuple[int, ...] | None, length: int) -> Chunks:
        """As the constructor, cached: every layer of a model needs the same chunks."""
        return Chunks(batch, tokens, cu, length)

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [M, length, ...]; padding holds `fill`."""
        (batch, tokens), length, rest = self.shape, self.length, x.shape[2:]
        if self.order is None:
            steps = len(self.alive)
            pad = steps * length - tokens
            if pad:
                x = F.pad(x, (0, 0) * len(rest) + (0, pad), value=fill)
            return x.reshape(batch, steps, length, *rest).transpose(0, 1).reshape(steps * batch, length, *rest)
        chunks = x.new_full((sum(self.alive) * length, *rest), fill)
        chunks = chunks.index_copy(0, self.place.to(x.device), x[0])
        return chunks.reshape(-1, length, *rest)

    def join(self, chunks: Tensor) -> Tensor:
        """[M, length, ...] -> [B, T, ...], padding dropped."""
        (batch, tokens), length, rest = self.shape, self.length, chunks.shape[2:]
        if self.order is None:
            steps = len(self.alive)
            x = chunks.reshape(steps, batch, length, *rest).transpose(0, 1)
            return x.reshape(batch, steps * length, *rest)[:, :tokens]
        return chunks.reshape(-1, *rest)[self.place.to(chunks.device)][None]

    def to_chunk_order(self, state: Tensor) -> Tensor:
        """The caller's state rows in chunk order."""
        return state if self.order is None else state[self.order]

    def from_chunk_order(self, finished: list[Tensor]) -> Tensor:
        """Final states in the order in which sequences ended (shortest first) -> in the caller's order."""
        state = torch.cat(finished[::-1])
        if self.order is None:
            return state
        back = torch.tensor(self.order, device=state.device).argsort()
        return state[back]
