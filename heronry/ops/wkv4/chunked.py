"""WKV4 over all chunks at once: LENGTH steps inside them, one step from each to the next (see README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Chunks

LENGTH = 32  # T/32 small steps and 32 wide ones: the two balance near T = 1024, and wide steps stay in cache
NOTHING = -1e38  # the exponent of an empty sum and the key of padding: unlike -inf it can be subtracted from itself


def chunked(
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv4`; cu is the checked tuple of boundaries."""
    cut = Chunks.cached(k.shape[0], k.shape[1], cu, LENGTH)
    dtype = v.dtype
    log_w, k, v, u = (x.to(state.dtype) for x in (log_w, k, v, u))
    real = cut.split(torch.ones_like(k[..., :1]))  # [M, L, 1], 0 at padding, which must not decay either
    k, v = cut.split(k, fill=NOTHING), cut.split(v)  # [M, L, A]
    pair = torch.stack([v, torch.ones_like(v)], dim=2)  # [M, L, 2, A], the unweighted terms of the sums A and B

    # a chunk on its own: the sums over its tokens, in the unit of its largest term
    count = real.cumsum(1)
    fade = (count[:, -1:] - count) * log_w  # [M, L, A], log of each token's decay until the chunk's end
    top = (k + fade).detach().amax(1, keepdim=True)  # [M, 1, A]
    total = ((k - top + fade).exp()[:, :, None] * pair).sum(1)  # [M, 2, A]
    decay = count[:, -1:] * log_w  # [M, 1, A]

    # from chunk to chunk
    entering, finished = [], []
    state = cut.to_chunk_order(state)
    for own, own_p, own_decay in zip(*(x.split(cut.alive) for x in (total, top, decay)), strict=True):
        if len(own) < len(state):
            finished.append(state[len(own) :])
            state = state[: len(own)]
        entering.append(state)
        ab, p = state[:, :2], state[:, 2:]
        m = torch.maximum(p + own_decay, own_p).detach()
        state = torch.cat([(p - m + own_decay).exp() * ab + (own_p - m).exp() * own, m], dim=1)
    finished.append(state)

    # inside all chunks: first the units p, which need no gradient, then the sums in these units
    ab, p = torch.cat(entering).split([2, 1], dim=1)
    step = real * log_w  # [M, L, A]
    units = [p[:, 0]]
    with torch.no_grad():
        for step_t, k_t in zip(step.unbind(1), k.unbind(1), strict=True):
            units.append(torch.maximum(units[-1] + step_t, k_t))
    before, after = torch.stack(units[:-1], dim=1), torch.stack(units[1:], dim=1)  # [M, L, A]
    keep = (before - after + step).exp()[:, :, None]
    add = (k - after).exp()[:, :, None] * pair
    sums = []
    for keep_t, add_t in zip(keep.unbind(1), add.unbind(1), strict=True):
        sums.append(ab)
        ab = torch.addcmul(add_t, keep_t, ab)

    m = torch.maximum(before, k + u).detach()
    mixed = (before - m).exp()[:, :, None] * torch.stack(sums, dim=1) + (k - m + u).exp()[:, :, None] * pair
    return cut.join(mixed[:, :, 0] / mixed[:, :, 1]).to(dtype), cut.from_chunk_order(finished)
