"""The optimizer: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..models import Network
from .config import OptimSection


def build_optimizer(model: Network, config: OptimSection) -> torch.optim.Optimizer:
    """AdamW (Adam where nothing decays) with the parameter groups of the model's generation, or of its adapters.

    Each group stores its own learning rate as "base_lr". With `muon`, the matrices inside the blocks are trained by
    Muon.
    """
    param_groups = model.param_groups if model.adapted_from is None else partial(_adapter_groups, model)
    groups = param_groups(config.lr, config.weight_decay)
    trained = {p for p in model.parameters() if p.requires_grad}
    inner = []
    if config.muon and model.adapted_from is None:
        named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and p in trained]
        inner = [p for name, p in named if name.startswith(("blocks.", "layers.")) and name.endswith(".weight")]
    groups = [_select_parameters(group, trained.difference(inner)) for group in groups]
    groups = [group for group in groups if group["params"]]
    if model.sharded:  # foreach saves time with many small shards, but cannot mix them with unsharded parameters
        groups = [{**group, "foreach": len({type(p) for p in group["params"]}) == 1} for group in groups]
    adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    if not config.muon:
        return adamw
    if not inner:
        raise InputError("optim.muon is for the matrices inside the blocks, but none of them is trained here")
    group = _select_parameters({"params": inner, "lr": config.lr, "weight_decay": config.weight_decay}, trained)
    return CombinedOptimizer(adamw, torch.optim.Muon([group], momentum=0.95, adjust_lr_fn="match_rms_adamw"))


def _select_parameters(group: dict[str, Any], selected: set[nn.Parameter]) -> dict[str, Any]:
    """The group with only the selected parameters."""
    return {**group, "params": [p for p in group["params"] if p in selected], "base_lr": group["lr"]}


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Lets the parts use the state and the groups of this optimizer."""
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


def _adapter_groups(model: Network, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The blocks of MiSS, and A and B decay, which pulls towards the base model; the magnitudes of DoRA do not, as they
    are not changes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim == 1], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
    ]
