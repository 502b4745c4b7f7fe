"""Sequence parallelism: rows of tokens, of which every process of a group holds a consecutive piece.

- over a piece an operator is an affine map of its initial state S: the final state is S P + Q, the output y_t + S x_t
  at token t. Run from zeros, the operator gives (y, Q) of the piece; run from the identity, with values of 0, it gives
  (x, P), because the rows of a state do not interact
- every process computes both. They exchange P and Q, and each composes those of the processes before it into its
  initial state
- the token shift takes the last vector of the previous process
- in the backward pass the gradient of what a process sent is the sum of the gradients from all receivers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .state import LayerState, State

Operator = Callable[..., tuple[Tensor, Tensor]]  # wkv5, wkv6 or wkv7


class SequenceShard(Sequence[int]):
    """The `cu_seqlens` of a process that has one piece of each of some rows, packed one after the other.

    `logits, state = model(tokens, state, cu_seqlens=SequenceShard(...))` on every process of the group is equivalent to
    running the whole rows at once: it returns the logits of this process's tokens and the states at the ends of its
    sequences. A sequence that began on the previous process continues from there, whatever its row of the given `state`
    holds. All processes must make the same calls in the same order, in the forward and in the backward pass.

    Args:
        cu: (0, ..., T), where the sequences of this process's pieces begin and end.
        firsts: for every row, the index of its first sequence here, rising from 0; as many rows on every process.
        goes_on: for every row, whether that sequence began on the previous process. Ignored on the first process.
        group: the processes in the order of their pieces, which may differ in length.
    """

    # not a tuple: DistributedDataParallel would turn it into a plain one on its way to a GPU
    def __init__(self, cu: Sequence[int], firsts: Sequence[int], goes_on: Sequence[bool], group: dist.ProcessGroup):
        self.cu, self.group = tuple(cu), group
        self.lasts = [*(first - 1 for first in firsts[1:]), len(cu) - 2]  # each row's last sequence
        self.rows = [row for row, on in enumerate(goes_on) if on and group.rank() > 0]  # continue the previous process
        self.entering = [firsts[row] for row in self.rows]  # their first sequences
        # indices into `entering` of the sequences that fill their whole piece
        self.spanning = [i for i, row in enumerate(self.rows) if firsts[row] == self.lasts[row]]

    def __getitem__(self, i: Any) -> Any:
        return self.cu[i]

    def __len__(self) -> int:
        return len(self.cu)

    def shift(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x [1, T, C] unchanged, and `shift` [S, C] with the last vectors of the previous process."""
        ends = [self[last + 1] - 1 for last in self.lasts]
        x, left = _exchange(x, x[0, ends], self.group)  # [processes, rows, C]
        if self.rows:
            shift = shift.index_copy(0, _numbers(self.entering, x), left[self.group.rank() - 1, self.rows])
        return x, shift

    def run_operator(self, operator: Operator, inputs: Sequence[Tensor], wkv: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the operator over the whole rows; returns y [1, T, H, N], and the states [S, H, N, N] at the ends of
        this process's sequences."""
        entering = _numbers(self.entering, wkv)
        y, left = operator(*inputs, wkv.index_fill(0, entering, 0), cu_seqlens=self.cu)
        q = left[self.lasts]
        p = torch.zeros_like(q)  # if a document begins or ends in a piece, none of the entering state leaves it
        if self.rows:
            read, passed = self._without_values(operator, inputs, left)
            p = p.index_copy(0, _numbers([self.rows[i] for i in self.spanning], p), passed[self.spanning])
        y, maps = _exchange(y, torch.stack([p, q]), self.group)  # [processes, 2, rows, H, N, N]
        if self.rows:
            (_, state), *between = maps[: self.group.rank()]
            for p, q in between:
                state = state @ p + q
            state = state[self.rows]
            parts = zip(read.split(self._lengths, 1), state, strict=True)
            more = torch.cat([torch.einsum("bthk,hvk->bthv", x, own) for x, own in parts], 1)
            y = y.index_add(1, self._tokens(y), more.to(y.dtype))
            left = left.index_add(0, entering, state @ passed)
        return y, left

    def broadcast_final_state(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns x unchanged, and the states of the rows on the last process, where the rows end."""
        flat = torch.cat([part.flatten() for layer in state.layers for part in layer])
        x, left = _exchange(x, flat, self.group)
        sizes = [part.numel() for layer in state.layers for part in layer]
        parts = iter(left[-1].split(sizes))
        layers = [LayerState(*(next(parts).view_as(own) for own in layer)) for layer in state.layers]
        return x, State(layers, state.fingerprint)

    def _without_values(self, operator: Operator, inputs: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the operator from the identity, with values of 0, over the sequences that continue from the previous
        process; returns their x_t [1, tokens, H, N], and P of each."""
        r, log_w, _, v, *rest = (x if x.ndim < 4 else self._taken(x) for x in inputs)
        nothing = like.new_zeros(1).expand_as(v)
        identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        state = identity.expand(len(self.rows), *like.shape[1:])
        return operator(r, log_w, nothing, nothing, *rest, state, cu_seqlens=(0, *accumulate(self._lengths)))

    @property
    def _lengths(self) -> list[int]:
        return [self[s + 1] - self[s] for s in self.entering]

    def _tokens(self, like: Tensor) -> Tensor:
        return torch.cat([torch.arange(self[s], self[s + 1], device=like.device) for s in self.entering])

    def _taken(self, x: Tensor) -> Tensor:
        if len(self.entering) == len(self) - 1:
            return x
        return torch.cat([x[:, self[s] : self[s + 1]] for s in self.entering], 1)


Boundaries = tuple[int, ...] | SequenceShard  # of sequences packed in one row


def run_operator(
    operator: Operator, inputs: Sequence[Tensor], wkv: Tensor, cu: Boundaries | None
) -> tuple[Tensor, Tensor]:
    """operator(*inputs, wkv, cu_seqlens=cu), over all processes if cu is a SequenceShard."""
    if not isinstance(cu, SequenceShard):
        return operator(*inputs, wkv, cu_seqlens=cu)
    with torch.autocast(wkv.device.type, enabled=False):
        return cu.run_operator(operator, inputs, wkv)


def _exchange(x: Tensor, part: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Returns x unchanged, and the `part` of every process, [processes, ...]."""
    anchor = torch.zeros((), device=x.device, requires_grad=True)
    exchanged: tuple[Tensor, Tensor] = _Exchange.apply(x, part, anchor, group)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """An all-gather with gradients. In the backward pass every process must take part, whether or not it has used the
    parts of the others and whether or not its own part has a gradient: so x, on which the loss depends, passes through,
    and `anchor` always requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, anchor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        parts = part.new_empty(group.size(), *part.shape)
        dist.all_gather(list(parts), part.contiguous(), group=group)
        return x.view_as(x), parts

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dparts: Tensor) -> tuple[Tensor, Tensor, None, None]:
        own = torch.empty_like(dparts)
        dist.all_to_all_single(own, dparts.contiguous(), group=ctx.group)
        return dx, own.sum(0), None, None


def _numbers(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
