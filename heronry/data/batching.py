"""Samplers: which tokens form row i of the training data, and batches of rows.

A sampler has no position: `row(i)` does not depend on earlier calls, and i counts up through all epochs. So a run that
resumes at row 1000 sees exactly the remaining rows, and rank r of n, which reads rows r, r + n, ..., sees its share of
what a single process would see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models.sequence_parallel import Boundaries, SequenceShard
from .token_file import TokenFile

WINDOW_ORDERS = ("shuffle", "magic_prime", "random", "sequential")
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its fractional part


@dataclass(frozen=True, eq=False)
class Row:
    """One training sequence of T tokens."""

    inputs: NDArray[Any]  # int64 [T]
    targets: NDArray[Any]  # int64 [T], the next token of each position
    mask: NDArray[Any] | None = None  # bool [T], which targets count in the loss; None: all
    starts: tuple[int, ...] = (0,)  # where documents begin, which must not see anything before
    continues: bool = False  # the first document started in an earlier row of this lane and needs its final state
    source: int = 0  # which token file of a mixture it is from

    def piece(self, index: int, n_pieces: int) -> Row:
        """One of `n_pieces` consecutive pieces of nearly equal length. A document that is cut `continues` in the next
        one."""
        first, end = (len(self.inputs) * n // n_pieces for n in (index, index + 1))
        part = slice(first, end)
        return Row(
            self.inputs[part],
            self.targets[part],
            None if self.mask is None else self.mask[part],
            (0, *(start - first for start in self.starts if first < start < end)),
            self.continues if index == 0 else first not in self.starts,
            self.source,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as input of a model: side by side [B, T], or packed into one row [1, T] with `cu_seqlens`."""

    inputs: Tensor  # int64
    targets: Tensor  # int64, the same shape
    mask: Tensor | None  # bool, the same shape; None: all targets count
    cu_seqlens: Boundaries | None  # (0, ..., T)


class DocumentSampler:
    """Whole documents, in a new order every epoch, concatenated and cut into rows.

    The inputs of a document are [end_of_text, d0, d1, ...], its targets [d0, d1, ...]: every token of the file is a
    target once per epoch. No document sees another. A document that is cut at the end of a row continues in the next
    row, whose first input is the last token before the cut. The last row of an epoch may be shorter.

    Attributes:
        rows_per_epoch: number of rows.
        tokens_per_epoch: tokens that are targets in them.
        shortest_row: tokens of the shortest row.
    """

    def __init__(self, file: TokenFile, length: int, seed: int = 0):
        """
        Args:
            file: the documents.
            length: T, in tokens.
            seed: of the order, from 0 to 2^64 - 1.

        Raises:
            InputError: the length is below 1, or the seed out of range.
        """
        _check(length, seed)
        self.file, self.length, self.seed = file, length, seed
        lengths = np.diff(file.offsets)
        self._documents = np.flatnonzero(lengths)  # without empty ones
        self._lengths = lengths[self._documents]
        self.tokens_per_epoch = len(file.tokens)
        self.rows_per_epoch = -(-len(file.tokens) // length)
        self.shortest_row = len(file.tokens) - (self.rows_per_epoch - 1) * length
        self._last: tuple[int, NDArray[Any], NDArray[Any]] | None = None

    def row(self, i: int) -> Row:
        """Row i >= 0, counted through all epochs."""
        epoch, j = divmod(i, self.rows_per_epoch)
        order, ends = self._epoch(epoch)
        position = j * self.length  # in the tokens of the epoch
        stop = min(position + self.length, int(ends[-1]))
        inputs, targets = np.empty((2, stop - position), np.int64)
        mask = None if self.file.mask is None else np.empty(stop - position, bool)
        starts, continues = [], False
        index, filled = int(np.searchsorted(ends, position, side="right")), 0
        while position < stop:
            document, end = order[index], int(ends[index])
            n = min(end, stop) - position
            last = int(self.file.offsets[document + 1])  # where the document ends in the file
            first = last - (end - position)
            part = slice(filled, filled + n)
            targets[part] = self.file.tokens[first : first + n]
            inputs[filled + 1 : filled + n] = targets[filled : filled + n - 1]
            begins = first == self.file.offsets[document]
            continues = continues or not begins
            inputs[filled] = self.file.end_of_text if begins else self.file.tokens[first - 1]
            if mask is not None and self.file.mask is not None:
                mask[part] = self.file.mask[first : first + n]
            starts.append(filled)
            position, filled, index = position + n, filled + n, index + 1
        return Row(inputs, targets, mask, tuple(starts), continues)

    def tokens_read(self, n_rows: int, lane: int = 0) -> int:
        """How many tokens are targets in the first rows. lane: there is only one."""
        epoch, j = divmod(n_rows, self.rows_per_epoch)
        return epoch * self.tokens_per_epoch + j * self.length

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The documents of an epoch in order, and where each of them ends in its tokens, both int64."""
        last = self._last  # read once: another thread may store the next epoch meanwhile
        if last is None or last[0] != epoch:
            order = generator_for(self.seed, epoch).permutation(len(self._documents))
            last = self._last = epoch, self._documents[order], np.cumsum(self._lengths[order])
        return last[1:]


class LaneSampler:
    """Documents as above, but every row continues where the previous row of its lane ended, for carried states.

    The rows of an epoch are divided into `lanes` consecutive stretches, one per lane. Row i belongs to lane i % lanes,
    and the next row of that lane is i + lanes. A lane that has reached the end of its stretch begins the one of the
    next epoch, so every token is a target once per epoch. A document can be of any length.

    Attributes:
        rows_per_epoch: number of rows.
        tokens_per_epoch: tokens that are targets in them.
        shortest_row: tokens of the shortest row.
    """

    def __init__(self, file: TokenFile, length: int, lanes: int, seed: int = 0):
        """
        Raises:
            InputError: as for DocumentSampler, or fewer rows than lanes.
        """
        self.documents, self.lanes = DocumentSampler(file, length, seed), lanes
        self.rows_per_epoch, self.shortest_row = self.documents.rows_per_epoch, self.documents.shortest_row
        self.tokens_per_epoch = self.documents.tokens_per_epoch
        if self.rows_per_epoch < lanes:
            raise InputError(
                f"{file.prefix}: too small: {self.rows_per_epoch} rows of {length} tokens for {lanes} lanes"
            )

    def row(self, i: int) -> Row:
        """Row i >= 0, counted through all epochs."""
        step, lane = divmod(i, self.lanes)
        first, end = self._stretch(lane)
        epoch, j = divmod(step, end - first)
        row = self.documents.row(epoch * self.rows_per_epoch + first + j)
        return row if j else replace(row, continues=False)  # another lane has read the row before

    def tokens_read(self, n_rows: int, lane: int) -> int:
        """How many tokens are targets in the first rows of a lane."""
        first, end = self._stretch(lane)
        epoch, j = divmod(n_rows, end - first)
        before_first, before_next, before_end = map(self.documents.tokens_read, (first, first + j, end))
        return epoch * (before_end - before_first) + before_next - before_first

    def _stretch(self, lane: int) -> tuple[int, int]:
        """The rows of an epoch that a lane reads: the first, and the one behind the last."""
        return lane * self.rows_per_epoch // self.lanes, (lane + 1) * self.rows_per_epoch // self.lanes


class WindowSampler:
    """Windows of the tokens as they are in the file, across the boundaries of documents.

    A window at a has the inputs tokens[a : a + T] and the targets tokens[a + 1 : a + T + 1]. The orders:

    - "shuffle", "sequential": adjacent windows; every token but the first of the file is a target once per epoch. The
      last window may be shorter. "shuffle" draws a new order every epoch.
    - "magic_prime": the order of RWKV-LM, row for row. Windows start at (floor(phi P) j^3 mod P) T with j = i + 1, phi
      the fractional part of the golden ratio and P the largest prime that is 2 mod 3 and at most N // T - 1, for which
      cubing is a bijection. An epoch has P different rows; windows beyond P T are never seen, and every epoch has the
      same order.
    - "random": every window starts anywhere. On average a token is a target once in `rows_per_epoch` rows.

    Attributes:
        rows_per_epoch: number of rows.
        tokens_per_epoch: tokens that are targets in them.
        shortest_row: tokens of the shortest row.
    """

    def __init__(self, file: TokenFile, length: int, seed: int = 0, order: str = "shuffle"):
        """
        Args:
            file: the tokens.
            length: T, in tokens.
            seed: of "shuffle" and "random", from 0 to 2^64 - 1.
            order: see above.

        Raises:
            InputError: an unknown order, a length below 1, a seed out of range, too few tokens.
        """
        _check(length, seed)
        if order not in WINDOW_ORDERS:
            raise InputError(f"unknown order {order!r}; known: {', '.join(WINDOW_ORDERS)}")
        self.file, self.length, self.seed, self.order = file, length, seed, order
        targets = len(file.tokens) - 1
        if targets < 1:
            raise InputError(f"{file.prefix}: too small: a single token has nothing to predict")
        self.rows_per_epoch = -(-targets // length)
        if order == "magic_prime":
            self.rows_per_epoch = magic_prime(len(file.tokens) // length - 1)
            if not self.rows_per_epoch:
                raise InputError(
                    f"{file.prefix}: too small: the order magic_prime needs {3 * length} tokens, got {targets + 1}"
                )
        self._equal = order in ("magic_prime", "random")  # all rows have the same length
        whole_row = min(length, targets)
        self.tokens_per_epoch = self.rows_per_epoch * whole_row if self._equal else targets
        self.shortest_row = whole_row if self._equal else targets - (self.rows_per_epoch - 1) * length
        self._last: tuple[int, NDArray[Any]] | None = None

    def row(self, i: int) -> Row:
        """Row i >= 0, counted through all epochs."""
        start = self._start(i)
        tokens = self.file.tokens[start : start + self.length + 1].astype(np.int64)
        mask = None if self.file.mask is None else self.file.mask[start + 1 : start + len(tokens)].astype(bool)
        return Row(tokens[:-1], tokens[1:], mask)

    def _start(self, i: int) -> int:
        """The first token of window i."""
        n = self.rows_per_epoch
        if self.order == "random":
            return int(generator_for(self.seed, i).integers(max(1, len(self.file.tokens) - self.length)))
        if self.order == "magic_prime":
            return int(n * GOLDEN_RATIO) * (i + 1) ** 3 % n * self.length
        epoch, j = divmod(i, n)
        return j * self.length if self.order == "sequential" else int(self._epoch(epoch)[j]) * self.length

    def tokens_read(self, n_rows: int, lane: int = 0) -> int:
        """How many tokens are targets in the first rows. lane: there is only one."""
        if self._equal:
            return n_rows * self.shortest_row
        epoch, j = divmod(n_rows, self.rows_per_epoch)
        tokens = epoch * self.tokens_per_epoch + j * self.length
        if self.order == "shuffle" and self.rows_per_epoch - 1 in self._epoch(epoch)[:j]:  # the shorter window
            tokens -= self.length - self.shortest_row
        return tokens

    def _epoch(self, epoch: int) -> NDArray[Any]:
        """The windows of an epoch in the order "shuffle", int64."""
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = epoch, generator_for(self.seed, epoch).permutation(self.rows_per_epoch)
        return last[1]


def collate(rows: Sequence[Row], group: dist.ProcessGroup | None = None) -> Batch:
    """Makes a batch of rows.

    Rows of equal length that hold one sequence each are put side by side; others are packed. With a `group` of
    processes the rows are this process's pieces of longer rows, and packed.
    """
    whole = group is None and all(row.starts == (0,) and len(row.inputs) == len(rows[0].inputs) for row in rows)

    def join(arrays: list[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.stack(arrays) if whole else np.concatenate(arrays)[None])

    mask = None
    if any(row.mask is not None for row in rows):
        mask = join([np.ones(len(row.inputs), bool) if row.mask is None else row.mask for row in rows])
    cu_seqlens: Boundaries | None = None
    if not whole:
        offsets = np.cumsum([0, *(len(row.inputs) for row in rows)]).tolist()
        starts = [offset + start for offset, row in zip(offsets, rows, strict=False) for start in row.starts]
        cu_seqlens = (*starts, offsets[-1])
        if group is not None:
            firsts = [0, *accumulate(len(row.starts) for row in rows[:-1])]
            cu_seqlens = SequenceShard(cu_seqlens, firsts, [row.continues for row in rows], group)
    return Batch(join([row.inputs for row in rows]), join([row.targets for row in rows]), mask, cu_seqlens)


def _check(length: int, seed: int) -> None:
    if length < 1:
        raise InputError(f"the length of a row must be at least 1, got {length}")
    if not 0 <= seed < 2**64:
        raise InputError(f"the seed must be from 0 to 2^64 - 1, got {seed}")


def generator_for(seed: int, number: int) -> np.random.Generator:
    """A random generator that depends only on these two."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def magic_prime(limit: int) -> int:
    """The largest prime up to `limit` that is 2 mod 3; 0 if there is none."""
    for p in range(limit, 1, -1):
        if p % 3 == 2 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p
    return 0
