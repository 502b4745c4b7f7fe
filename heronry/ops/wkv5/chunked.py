"""WKV5 in matrix products: WKV6 with the same decay at every token."""

from __future__ import annotations

from torch import Tensor

from ..wkv6.chunked import chunked as wkv6_chunked


def chunked(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    cu: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor]:
    """See `wkv5`; cu is the checked tuple of boundaries."""
    return wkv6_chunked(r, log_w.expand_as(r), k, v, u, state, cu)
