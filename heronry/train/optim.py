"""The optimiser of the recipe."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..models import Model
from .config import OptimSection


def optimizer(model: Model, of: OptimSection) -> torch.optim.Optimizer:
    """AdamW (Adam where nothing decays) over the groups of the generation, or of its adapters; each group remembers its
    own rate as "base_lr". With `muon` the matrices inside the blocks are Muon's."""
    own = model.param_groups if model.adapted_from is None else partial(_of_adapters, model)
    groups = own(of.lr, of.weight_decay)
    trained = {p for p in model.parameters() if p.requires_grad}
    inner = []
    if of.muon and model.adapted_from is None:
        named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and p in trained]
        inner = [p for name, p in named if name.startswith(("blocks.", "layers.")) and name.endswith(".weight")]
    groups = [_of(group, trained.difference(inner)) for group in groups]
    groups = [group for group in groups if group["params"]]
    if model.sharded:  # pieces cost as much for each call as they hold; what stays whole cannot go among them
        groups = [{**group, "foreach": len({type(p) for p in group["params"]}) == 1} for group in groups]
    adamw = torch.optim.AdamW(groups, betas=of.betas, eps=of.eps)
    if not of.muon:
        return adamw
    if not inner:
        raise InputError("optim.muon is for the matrices inside the blocks, and none of them is trained here")
    group = _of({"params": inner, "lr": of.lr, "weight_decay": of.weight_decay}, trained)
    return Together(adamw, torch.optim.Muon([group], momentum=0.95, adjust_lr_fn="match_rms_adamw"))


def _of(group: dict[str, Any], wanted: set[nn.Parameter]) -> dict[str, Any]:
    """What is wanted of a group."""
    return {**group, "params": [p for p in group["params"] if p in wanted], "base_lr": group["lr"]}


class Together(torch.optim.Optimizer):
    """Several optimisers, each with parameters of its own, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _of_adapters(model: Model, lr: float, weight_decay: float) -> list[dict]:
    """A and B decay, which draws towards the model as it was; the magnitudes of DoRA do not, they are no changes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim == 1], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim == 2], "lr": lr, "weight_decay": weight_decay},
    ]
