"""WKV5 in C++: WKV6 with the same decay at every token."""

from __future__ import annotations

from torch import Tensor

from ..wkv6.cpu import cpu as wkv6_cpu


def cpu(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv5`; cu is the checked tuple of boundaries."""
    shape = r.shape[2:]
    return wkv6_cpu(r, log_w.expand(shape).contiguous(), k, v, u.expand(shape).contiguous(), state, cu)
