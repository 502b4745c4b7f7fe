"""WKV7 in matrix products: 32 tokens at a time (derivation in README.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Chunks

LENGTH = 32  # e^(32 * 0.6065) = 3e8: un-centred factors stay far inside float32


def chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv7`; cu is the checked tuple of boundaries."""
    cut = Chunks.cached(r.shape[0], r.shape[1], cu, LENGTH)
    dtype = v.dtype

    def heads_first(x: Tensor) -> Tensor:  # [B, T, H, N] -> [M, H, L, N]
        return cut.split(x.to(state.dtype)).transpose(1, 2)

    r, log_w, k, v, a, b = (heads_first(x) for x in (r, log_w, k, v, a, b))
    c = log_w.cumsum(-2)  # [M, H, L, N], decay from the chunk's start through token t
    decay, undo = c.exp(), (-c).exp()
    whole = decay[..., -1:, :]  # [M, H, 1, N]
    r_in, a_in = r * decay, a * (c - log_w).exp()  # the reads: decayed from the chunk's start
    k_in, b_in = k * undo, b * undo  # the writes: their decay from the chunk's start undone
    k_out, b_out = k_in * whole, b_in * whole  # the writes, decayed to the chunk's end

    # z_t = S_{t-1} a_t solves Z = A_ab Z + A_ak V + a_in S_0^T, so Z = w S_0^T + u
    a_ab = (a_in @ b_in.mT).tril(-1)
    a_ak = (a_in @ k_in.mT).tril(-1)
    identity = torch.eye(LENGTH, dtype=c.dtype, device=c.device).expand_as(a_ab)
    inverse = torch.linalg.solve_triangular(identity - a_ab, identity, upper=False, unitriangular=True)
    w, u = inverse @ a_in, inverse @ (a_ak @ v)  # [M, H, L, N_k], [M, H, L, N_v]

    # from chunk to chunk
    entering, zs, finished = [], [], []
    state = cut.to_chunk_order(state)
    per_chunk = (x.split(cut.alive) for x in (whole, v.mT @ k_out, w, u, b_out))
    for own_decay, own_kv, own_w, own_u, own_b in zip(*per_chunk, strict=True):
        if len(own_w) < len(state):
            finished.append(state[len(own_w) :])
            state = state[: len(own_w)]
        entering.append(state)
        zs.append(own_w @ state.mT + own_u)
        state = state * own_decay + own_kv + zs[-1].mT @ own_b
    finished.append(state)
    s0, z = torch.cat(entering), torch.cat(zs)  # [M, H, N_v, N_k], the state before each chunk, and [M, H, L, N_v]

    y = r_in @ s0.mT + (r_in @ k_in.mT).tril() @ v + (r_in @ b_in.mT).tril() @ z
    return cut.join(y.transpose(1, 2)).to(dtype), cut.from_chunk_order(finished)
