"""WKV6 in matrix products: blocks of 1, 2, 4, ... tokens, merged in pairs of neighbours (see README.md)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packing import Chunks

LENGTH = 32  # a power of two; longer chunks have more doublings, shorter ones more states to keep (README.md)


def chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv6`; cu is the checked tuple of boundaries."""
    cut = Chunks.cached(r.shape[0], r.shape[1], cu, LENGTH)
    dtype = v.dtype

    def heads_first(x: Tensor) -> Tensor:  # [B, T, H, N] -> [M, H, L, N]
        return cut.split(x.to(state.dtype)).transpose(1, 2)

    r, log_w, k, v = (heads_first(x) for x in (r, log_w, k, v))
    u = u.to(state.dtype)[:, None]

    # blocks of one token; every decay is a product of numbers in [0, 1], so nothing can overflow
    scores = (r * u * k).sum(-1)[..., None, None]  # [M, H, L/n, n, n], y = scores V inside a block of n tokens
    r_in = r[..., None, :]  # [M, H, L/n, n, N], r decayed from the block's start
    k_out = k[..., None, :]  # [M, H, L/n, n, N], k decayed to the block's end
    decay = log_w.exp()[..., None, :]  # [M, H, L/n, 1, N], of the whole block
    for n in (1 << level for level in range(LENGTH.bit_length() - 1)):
        (r0, r1), (k0, k1), (w0, w1), (s0, s1) = (
            x.unflatten(2, (-1, 2)).unbind(3) for x in (r_in, k_out, decay, scores)
        )
        across = r1 @ k0.mT  # the scores across the border: the later block reads the earlier one
        scores = torch.cat([F.pad(s0, (0, n)), torch.cat([across, s1], -1)], -2)
        r_in, k_out, decay = torch.cat([r0, r1 * w0], -2), torch.cat([k0 * w1, k1], -2), w0 * w1
    scores, r_in, k_out, decay = (x.squeeze(2) for x in (scores, r_in, k_out, decay))

    # from chunk to chunk
    entering, finished = [], []
    state = cut.to_chunk_order(state)
    for kv, w in zip((v.mT @ k_out).split(cut.alive), decay.split(cut.alive), strict=True):
        if len(kv) < len(state):
            finished.append(state[len(kv) :])
            state = state[: len(kv)]
        entering.append(state)
        state = torch.addcmul(kv, state, w)
    finished.append(state)

    y = r_in @ torch.cat(entering).mT + scores @ v
    return cut.join(y.transpose(1, 2)).to(dtype), cut.from_chunk_order(finished)
