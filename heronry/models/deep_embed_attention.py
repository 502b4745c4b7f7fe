"""DeepEmbedAttention (DEA) of RWKV-7b: attention beside the time mix, to which keys and values come from the token.

- a token leaves only 2 R numbers a layer (R = 32), kc and vc; its key and value are computed from them at every call
- each is multiplied by a vector that depends on the token alone: its row of a table, and a matrix times its embedding
- one head, with queries and keys of D numbers and values of C; no position, no window, no projection of the output
- it reads the residual stream before ln1, and what it finds is added to that of the time mix
- so a step takes O(S) time after S tokens, and the state grows with them (`Context` in state.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Linear, last_shift, token_shift, widen
from .sequence_parallel import Boundaries
from .state import Context

MAX_SCORES = 1 << 21  # computed at a time, so that a prompt's do not all exist together


class Words(NamedTuple):
    """All tokens of the S sequences of a call, one sequence after the other: N before and n in the call."""

    ids: Tensor  # [U], the different ones among them
    where: Tensor  # [N + n], each one's place in `ids`
    cu: tuple[int, ...]  # (0, ..., N + n), where the sequences begin and end
    counts: list[int]  # of each sequence, the tokens in the call
    e: Tensor  # [U, C], the input of the first block for `ids`

    @classmethod
    def look_up(
        cls, tokens: Tensor, contexts: Sequence[Context], cu: Boundaries | None, embed: Callable[[Tensor], Tensor]
    ) -> Words:
        """
        Args:
            tokens: [B, T] of the call, or packed [1, n] with `cu`.
            contexts: of each sequence, before the call.
            embed: ids [U] -> e.
        """
        batch, length = tokens.shape
        counts = [length] * batch if cu is None else [end - begin for begin, end in pairwise(cu)]
        everything = append([context.tokens for context in contexts], tokens.flatten().long(), counts)
        if torch.compiler.is_compiling():  # whose graphs cannot depend on how many differ
            ids, where = everything, torch.arange(len(everything), device=tokens.device)
        else:
            ids, where = everything.unique(return_inverse=True)
        lengths = (len(context.tokens) + count for context, count in zip(contexts, counts, strict=True))
        return cls(ids, where, (0, *accumulate(lengths)), counts, embed(ids))

    def of_call(self) -> Tensor:
        """`e` of the tokens in the call, [n, C]."""
        ends = zip(self.cu[1:], self.counts, strict=True)
        return self.e[torch.cat([self.where[end - count : end] for end, count in ends])]


class Added(NamedTuple):
    """What the n tokens of a call add to the contexts of one layer."""

    kc: Tensor  # [n, R]
    vc: Tensor  # [n, R]
    q: Tensor  # [S, D], of the last token of each sequence


class DeepEmbedAttention(nn.Module):
    def __init__(self, vocab_size: int, n_embd: int, dim: int, rank: int):
        super().__init__()
        v, c, d, r = vocab_size, n_embd, dim, rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        def table(columns: int) -> nn.Embedding:
            rows: nn.Embedding = nn.Embedding.from_pretrained(torch.zeros(v, columns), freeze=False)
            return rows

        self.qq = Linear(c, d)
        # low-rank: y = (x @ _1) @ _2, not in the layout of nn.Linear
        self.k1, self.k2 = parameter(c, r), parameter(r, d)
        self.v1, self.v2 = parameter(c, r), parameter(r, c)
        self.k_emb, self.k_emb_x = table(d), Linear(c, d)
        self.v_emb, self.v_emb_x = table(c), Linear(c, c)
        # m-type mixes: the share of the previous token
        self.x_q, self.x_k, self.x_v = parameter(1, 1, d), parameter(1, 1, d), parameter(1, 1, c)
        self.lnq, self.lnk, self.lnv = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(c)

    def forward(
        self,
        x: Tensor,  # [B, T, C], packed [1, n, C]
        past: Sequence[tuple[Tensor, Tensor, Tensor]],  # of each sequence kc [., R], vc [., R] and q [D]
        words: Words,
        cu: Boundaries | None,
    ) -> tuple[Tensor, Added]:
        kcs, vcs, qs = zip(*past, strict=True)
        q = self.qq(x)
        added = Added((x @ self.k1).flatten(0, 1), (x @ self.v1).flatten(0, 1), last_shift(q, cu))
        kc = append(kcs, added.kc, words.counts)  # [N + n, R]
        vc = append(vcs, added.vc, words.counts)
        k = (kc @ self.k2) * (self.k_emb(words.ids) + self.k_emb_x(words.e))[words.where]
        v = torch.tanh(vc @ self.v2) * (self.v_emb(words.ids) + self.v_emb_x(words.e))[words.where]
        q = self.lnq(torch.lerp(q, token_shift(q, torch.stack(qs), cu), self.x_q.to(q.dtype))).flatten(0, 1)
        k, v = (
            norm(torch.lerp(u, token_shift(u, u.new_zeros(len(past), u.shape[-1]), words.cu), mix.to(u.dtype)))[0]
            for u, mix, norm in ((k[None], self.x_k, self.lnk), (v[None], self.x_v, self.lnv))
        )
        lengths = [end - begin for begin, end in pairwise(words.cu)]
        sequences = zip(q.split(words.counts), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([attend(*sequence) for sequence in sequences]).to(x.dtype).view_as(x), added


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries [T, D] of the last T of S tokens, with keys [S, D] and values [S, C]: [T, C], in float32 at least."""
    step = max(1, MAX_SCORES // len(k))
    parts = []
    for begin in range(0, len(q), step):
        end = min(len(q), begin + step)
        seen = len(k) - len(q) + end
        part = (q[begin:end], k[:seen], v[:seen])
        if torch.is_grad_enabled() and step < len(q):  # else all scores would be kept for the backward pass
            parts.append(checkpoint(_attend, *part, use_reentrant=False))
        else:
            parts.append(_attend(*part))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        scores = 64 * torch.tanh(widen(q) @ widen(k).T / 1024)  # [T, S]
        later = torch.ones_like(scores, dtype=torch.bool).triu(len(k) - len(q) + 1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ widen(v)


def append(before: Sequence[Tensor], x: Tensor, counts: Sequence[int]) -> Tensor:
    """Of every sequence what was before, [., ...], and then its share of x [n, ...]; one after the other."""
    pairs = zip(before, x.split(list(counts)), strict=True)
    return torch.cat([part for old, new in pairs for part in (old.to(x.dtype), new)])


def extend(contexts: Sequence[Context], tokens: Tensor, counts: Sequence[int], added: Sequence[Added]) -> list[Context]:
    """The contexts after the call. tokens: of the call; added: by each layer."""
    kc, vc, q = (torch.stack(parts) for parts in zip(*added, strict=True))  # [L, n, R], [L, n, R], [L, S, D]
    shares = zip(
        tokens.flatten().split(list(counts)), kc.split(counts, 1), vc.split(counts, 1), q.unbind(1), strict=True
    )
    return [
        Context(
            torch.cat([old.tokens, ids]),
            torch.cat([old.kc, widen(kc)], 1),
            torch.cat([old.vc, widen(vc)], 1),
            widen(q),
        )
        for old, (ids, kc, vc, q) in zip(contexts, shares, strict=True)
    ]
