"""Pictures of states while a model talks: how much each head remembers."""

from __future__ import annotations

import torch

from ..models import State
from ..view.state import matrices

GROUPS = 64  # of the channels of an RWKV-4, which has no heads


@torch.inference_mode()
def head_norms(state: State) -> list[list[float]]:
    """The Frobenius norm of each head's memory in a state of one row, layer by layer, to four digits; of an RWKV-4 that
    of the averages that each group of channels remembers."""
    memory = matrices(state).to("cpu", torch.float32)
    if memory.dim() == 4:  # [L, H, N_v, N_k]
        norms = memory.norm(dim=(-2, -1))
    else:  # [L, 3, A], sums of values and of weights, and the exponent of both
        averages = memory[:, 0] / memory[:, 1].clamp(min=1e-30)
        groups = averages.tensor_split(min(GROUPS, averages.shape[-1]), dim=-1)
        norms = torch.stack([group.norm(dim=-1) for group in groups], dim=-1)
    return [[float(f"{x:.4g}") for x in row] for row in norms.tolist()]
