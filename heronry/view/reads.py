"""Which earlier tokens each token reads: the operators written as attention.

What a layer's operator returns for token t is a sum over the tokens s <= t of a weight times the value of token s:

- RWKV-4: weight[c, t, s], of every channel; a weighted mean, so the weights sum to 1
- RWKV-5 and 6: weight[h, t, s] = sum over n of r_t k_s prod(w_j for s < j < t), with the bonus u in place of the
  product for s = t
- RWKV-7: weight[h, t, s] = k_s . M_{s+1} ... M_t r_t with M_j = diag(w_j) + a_j b_j^T: what later tokens wrote under
  the same key is taken away
To this comes what a tuned initial state gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..models import Model
from ..ops.recording import Call
from .inside import as_row, check_size, is_rwkv4, operator_calls


class Reads(NamedTuple):
    """Of a text of T tokens.

    weights: of every layer [H, T, T], of RWKV-4 [A, T, T]: of token s (last axis) in what token t reads.
    shares: [L, H, T, T], with H = 1 for RWKV-4, from 0 to 1: |weight| times the length of the value (RWKV-4: the mean
        weight of all channels), as a part of the sum over s.
    error: the largest difference between the weights times the values and what the operator returned, relative to the
        largest number that it returned.
    """

    weights: list[NDArray[Any]]
    shares: NDArray[Any]
    error: float


@torch.no_grad()
def read_weights(model: Model, tokens: Sequence[int]) -> Reads:
    """Raises InputError for a text that is too long."""
    att = model.blocks[0].att
    units = att.time_decay.numel() if is_rwkv4(model) else att.heads
    check_size(len(model.blocks) * units * len(tokens) ** 2, "a map of what every token reads")
    calls = operator_calls(model, as_row(model, tokens))
    weights, shares, errors = [], [], []
    for call in calls:
        weight, from_start = operator_weights(call)
        returned = call.output[0][0].double()
        difference = weigh_values(call, weight) + from_start - returned
        errors.append(float(difference.abs().max() / returned.abs().max().clamp(min=1e-30)))
        weights.append(weight.float().cpu().numpy())
        shares.append(_shares(call, weight).float().cpu().numpy())
    return Reads(weights, np.stack(shares), max(errors))


def operator_weights(call: Call) -> tuple[Tensor, Tensor]:
    """The weights of one call of wkv4 [A, T, T], or of wkv5, 6 or 7 [H, T, T], 0 for s > t; and what the initial state
    adds, [T, A] or [T, H, N]. In float64.

    Raises:
        InputError: a call for several sequences.
    """
    if len(call.output[0]) > 1 or call.inputs[-1] is not None:
        raise InputError("the weights are those of one sequence: call the model with one, and without cu_seqlens")
    functions = {"wkv4": _wkv4, "wkv5": _wkv56, "wkv6": _wkv56, "wkv7": _wkv7}
    return functions[call.operator](call)


def weigh_values(call: Call, weight: Tensor) -> Tensor:
    """The weights times the values, [T, H, N] or [T, A]: what the operator returns if it begins from nothing."""
    if call.operator == "wkv4":
        return torch.einsum("ats,sa->ta", weight, call.inputs[2][0].double())
    return torch.einsum("hts,shn->thn", weight, call.inputs[3][0].double())


def _shares(call: Call, weight: Tensor) -> Tensor:
    if call.operator == "wkv4":
        amount = weight.mean(0, keepdim=True)
    else:
        amount = weight.abs() * call.inputs[3][0].double().norm(dim=-1).T[:, None]  # [H, T, T]
    return amount / amount.sum(-1, keepdim=True).clamp(min=1e-30)


def _wkv4(call: Call) -> tuple[Tensor, Tensor]:
    log_w, k, _, u, state, _ = call.inputs
    log_w, k, u, (a, b, p) = log_w.double(), k[0].double(), u.double(), state[0].double()
    n = len(k)
    time = torch.arange(n, device=k.device)
    between = (time[:, None] - time - 1).double()  # [t, s], tokens between the two
    exponents = between * log_w[:, None, None] + k.T[:, None]  # [A, t, s]
    exponents.diagonal(dim1=1, dim2=2).copy_((u + k).T)
    exponents.masked_fill_(between < -1, -torch.inf)
    start = time.double() * log_w[:, None] + p[:, None]  # [A, t], of both sums of the state
    largest = torch.maximum(exponents.amax(2), start)
    parts = (exponents - largest[..., None]).exp()
    left = (start - largest).exp()
    total = parts.sum(2) + b[:, None] * left
    return parts / total[..., None], (a[:, None] * left / total).T


def _wkv56(call: Call) -> tuple[Tensor, Tensor]:
    r, log_w, k, _, u, state, _ = call.inputs
    r, k, u, state = r[0].double(), k[0].double(), u.double(), state[0].double()
    log_w = log_w.double().expand_as(r) if call.operator == "wkv5" else log_w[0].double()
    until = log_w.cumsum(0)  # [T, H, N], the log of the decay from the beginning to after each token
    before = until - log_w
    n = len(r)
    weight = r.new_zeros(r.shape[1], n, n)
    for s in range(n):
        weight[:, s, s] = (r[s] * u * k[s]).sum(-1)
        kept = (before[s + 1 :] - until[s]).exp()  # of what token s wrote, when the later tokens read
        weight[:, s + 1 :, s] = (r[s + 1 :] * kept * k[s]).sum(-1).T
    return weight, torch.einsum("hvk,thk->thv", state, r * before.exp())


def _wkv7(call: Call) -> tuple[Tensor, Tensor]:
    r, log_w, k, _, a, b = (x[0].double() for x in call.inputs[:6])
    state = call.inputs[6][0].double()
    w, n = log_w.exp(), len(r)
    weight = r.new_zeros(r.shape[1], n, n)
    asked = r.new_zeros(r.shape)  # [t, H, N]: M_{s+1} ... M_t r_t, what token t asks of the state after token s
    for s in reversed(range(n)):
        asked[s] = r[s]
        later = asked[s:]
        weight[:, s:, s] = (later * k[s]).sum(-1).T
        asked[s:] = w[s] * later + a[s] * (b[s] * later).sum(-1, keepdim=True)
    return weight, torch.einsum("hvk,thk->thv", state, asked)
