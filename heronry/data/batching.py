"""Which tokens make row number i.

A sampler has no position: `row(i)` is the same whatever was asked before, i counting on through all epochs. So a run
that goes on from row 1000 sees exactly the rest, and rank r of n, reading rows r, r + n, ..., sees its share of what
one process would see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError
from ..models.sequence_parallel import Boundaries, SequenceShard
from .token_file import TokenFile

ORDERS = ("shuffle", "magic_prime", "random", "sequential")
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Row:
    """One training sequence of T tokens."""

    inputs: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T], what each position should predict
    mask: np.ndarray | None = None  # bool [T], which targets count; None = all
    starts: tuple[int, ...] = (0,)  # where a document begins that must not see what is before it
    continues: bool = False  # the first of them has begun in the lane's row before, whose last state it goes on from

    def piece(self, number: int, pieces: int) -> Row:
        """One of so many consecutive pieces, none longer than another by more than a token. What is cut `continues` in
        the piece after."""
        first, end = (len(self.inputs) * n // pieces for n in (number, number + 1))
        here = slice(first, end)
        return Row(
            self.inputs[here],
            self.targets[here],
            None if self.mask is None else self.mask[here],
            (0, *(start - first for start in self.starts if first < start < end)),
            self.continues if number == 0 else first not in self.starts,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as a model takes them: side by side [B, T], or packed in one row [1, T] with `cu_seqlens`."""

    inputs: Tensor  # int64
    targets: Tensor  # int64, the same shape
    mask: Tensor | None  # bool, the same shape; None = all targets count
    cu_seqlens: Boundaries | None  # (0, ..., T)


class Documents:
    """Whole documents, in a new order every epoch, laid end to end and cut into rows.

    The inputs of a document are [end_of_text, d0, d1, ...], its targets [d0, d1, ...]: every token of the file is a
    target once an epoch. No document sees another. One that is cut at the end of a row goes on in the next, whose
    first input is then the token before the cut. The last row of an epoch may be shorter.
    """

    def __init__(self, file: TokenFile, length: int, seed: int = 0):
        """
        Args:
            length: T, in tokens.
            seed: of the order, 0 to 2^64 - 1.

        Raises:
            InputError: a length below 1, a seed out of range.
        """
        _check(length, seed)
        self.file, self.length, self.seed = file, length, seed
        lengths = np.diff(file.offsets)
        self._documents = np.flatnonzero(lengths)  # those without a token make no row
        self._lengths = lengths[self._documents]
        self.rows_an_epoch = -(-len(file.tokens) // length)
        self.shortest = len(file.tokens) - (self.rows_an_epoch - 1) * length  # row, in tokens
        self._last: tuple[int, np.ndarray, np.ndarray] | None = None

    def row(self, i: int) -> Row:
        """Row i >= 0 of all epochs."""
        epoch, j = divmod(i, self.rows_an_epoch)
        order, ends = self._epoch(epoch)
        at = j * self.length
        stop = min(at + self.length, int(ends[-1]))
        inputs, targets = np.empty((2, stop - at), np.int64)
        mask = None if self.file.mask is None else np.empty(stop - at, bool)
        starts, continues = [], False
        place, done = int(np.searchsorted(ends, at, side="right")), 0
        while at < stop:
            document, end = order[place], int(ends[place])
            n = min(end, stop) - at
            last = int(self.file.offsets[document + 1])  # where the document ends in the file
            first = last - (end - at)
            here = slice(done, done + n)
            targets[here] = self.file.tokens[first : first + n]
            inputs[done + 1 : done + n] = targets[done : done + n - 1]
            begins = first == self.file.offsets[document]
            continues = continues or not begins
            inputs[done] = self.file.end_of_text if begins else self.file.tokens[first - 1]
            if mask is not None and self.file.mask is not None:
                mask[here] = self.file.mask[first : first + n]
            starts.append(done)
            at, done, place = at + n, done + n, place + 1
        return Row(inputs, targets, mask, tuple(starts), continues)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in their order, and int64 where each ends in the epoch's tokens."""
        last = self._last  # another thread may put the next epoch there meanwhile
        if last is None or last[0] != epoch:
            order = random(self.seed, epoch).permutation(len(self._documents))
            last = self._last = epoch, self._documents[order], np.cumsum(self._lengths[order])
        return last[1:]


class Lanes:
    """Documents as above, but every row goes on where its lane's last row ended: for states that are carried.

    The rows of an epoch are dealt in `lanes` stretches, one a lane. Row i is of lane i % lanes, and the next of that
    lane is row i + lanes. A lane that is through begins its stretch of the next epoch, so that every token is a target
    once an epoch. However long a document is, a row has `length` tokens of it.
    """

    def __init__(self, file: TokenFile, length: int, lanes: int, seed: int = 0):
        """
        Raises:
            InputError: as for Documents; fewer rows than lanes.
        """
        self.documents, self.lanes = Documents(file, length, seed), lanes
        self.rows_an_epoch, self.shortest = self.documents.rows_an_epoch, self.documents.shortest
        if self.rows_an_epoch < lanes:
            raise InputError(f"{file.prefix}: has {self.rows_an_epoch} rows of {length} tokens for {lanes} lanes")

    def row(self, i: int) -> Row:
        """Row i >= 0 of all epochs."""
        step, lane = divmod(i, self.lanes)
        first, end = (n * self.rows_an_epoch // self.lanes for n in (lane, lane + 1))
        epoch, j = divmod(step, end - first)
        row = self.documents.row(epoch * self.rows_an_epoch + first + j)
        return row if j else replace(row, continues=False)  # what is before it another lane has read


class Windows:
    """Windows of the tokens as they lie, documents running into one another.

    A window at a has the inputs tokens[a : a + T] and the targets tokens[a + 1 : a + T + 1]. The orders:

    - "shuffle", "sequential": windows side by side, every token but the file's first is a target once an epoch. The
      last window may be shorter. "shuffle" makes a new order every epoch.
    - "magic_prime": RWKV-LM's order, row for row. Windows begin at (floor(phi P) j^3 mod P) T with j = i + 1, phi the
      golden ratio's fraction and P the largest prime that is 2 mod 3 and at most N // T - 1, for which cubing is a
      bijection.
      An epoch is P rows, none twice; the windows behind P T are never seen, and every epoch has the same order.
    - "random": a beginning anywhere, every row for itself. On average a token is a target once in `rows_an_epoch`.
    """

    def __init__(self, file: TokenFile, length: int, seed: int = 0, order: str = "shuffle"):
        """
        Args:
            length: T, in tokens.
            seed: of "shuffle" and "random", 0 to 2^64 - 1.

        Raises:
            InputError: an unknown order, a length below 1, a seed out of range, too few tokens.
        """
        _check(length, seed)
        if order not in ORDERS:
            raise InputError(f"there is no order {order!r}; known are {', '.join(ORDERS)}")
        self.file, self.length, self.seed, self.order = file, length, seed, order
        targets = len(file.tokens) - 1
        if targets < 1:
            raise InputError(f"{file.prefix}: one token has nothing to predict")
        self.rows_an_epoch = -(-targets // length)
        if order == "magic_prime":
            self.rows_an_epoch = _prime(len(file.tokens) // length - 1)
            if not self.rows_an_epoch:
                raise InputError(
                    f"{file.prefix}: the order magic_prime needs {3 * length} tokens, there are {targets + 1}"
                )
        whole = order in ("magic_prime", "random")
        self.shortest = min(length, targets) if whole else targets - (self.rows_an_epoch - 1) * length  # row, in tokens
        self._last: tuple[int, np.ndarray] | None = None

    def row(self, i: int) -> Row:
        """Row i >= 0 of all epochs."""
        at = self._start(i)
        tokens = self.file.tokens[at : at + self.length + 1].astype(np.int64)
        mask = None if self.file.mask is None else self.file.mask[at + 1 : at + len(tokens)].astype(bool)
        return Row(tokens[:-1], tokens[1:], mask)

    def _start(self, i: int) -> int:
        n = self.rows_an_epoch
        if self.order == "random":
            return int(random(self.seed, i).integers(max(1, len(self.file.tokens) - self.length)))
        if self.order == "magic_prime":
            return int(n * GOLDEN) * (i + 1) ** 3 % n * self.length
        epoch, j = divmod(i, n)
        if self.order == "sequential":
            return j * self.length
        last = self._last
        if last is None or last[0] != epoch:
            last = self._last = epoch, random(self.seed, epoch).permutation(n)
        return int(last[1][j]) * self.length


def collate(rows: Sequence[Row], group: dist.ProcessGroup | None = None) -> Batch:
    """Rows of one length that are one sequence each lie side by side; others are packed, each document apart. With a
    `group` of processes the rows are this one's pieces of longer ones, and packed."""
    whole = group is None and all(row.starts == (0,) and len(row.inputs) == len(rows[0].inputs) for row in rows)

    def join(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays) if whole else np.concatenate(arrays)[None])

    mask = None
    if any(row.mask is not None for row in rows):
        mask = join([np.ones(len(row.inputs), bool) if row.mask is None else row.mask for row in rows])
    cu_seqlens: Boundaries | None = None
    if not whole:
        begins = np.cumsum([0, *(len(row.inputs) for row in rows)]).tolist()
        cu_seqlens = (*(at + start for at, row in zip(begins, rows, strict=False) for start in row.starts), begins[-1])
        if group is not None:
            firsts = [0, *accumulate(len(row.starts) for row in rows[:-1])]
            cu_seqlens = SequenceShard(cu_seqlens, firsts, [row.continues for row in rows], group)
    return Batch(join([row.inputs for row in rows]), join([row.targets for row in rows]), mask, cu_seqlens)


def _check(length: int, seed: int) -> None:
    if length < 1:
        raise InputError(f"a row needs at least one token, got a length of {length}")
    if not 0 <= seed < 2**64:
        raise InputError(f"the seed must be 0 to 2^64 - 1, got {seed}")


def random(seed: int, number: int) -> np.random.Generator:
    """Random numbers that depend on these two alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def _prime(most: int) -> int:
    """The largest prime up to `most` that is 2 mod 3; 0 if there is none."""
    for p in range(most, 1, -1):
        if p % 3 == 2 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p
    return 0
