"""The logits of a checkpoint without loading it: of the large matrices only some rows are in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.lazy_tensor import LazyTensor
from ..models import Model

N_TOKENS = 24  # tokens that both files are compared on
CHUNK = 1 << 20  # weights that are multiplied at a time


def sample_tokens(vocab_size: int) -> Tensor:
    """A fixed prompt, int64 [1, N_TOKENS]."""
    return torch.arange(1, N_TOKENS + 1)[None] * 7919 % vocab_size


@torch.inference_mode()
def compute_logits(cls: type[Model], config: Any, tensors: Mapping[str, LazyTensor]) -> Tensor:
    """The logits of `sample_tokens` in float32, [1, N_TOKENS, V].

    tensors: under BlinkDL's names, of a model of the class `cls` with `config`.
    """
    with torch.device("meta"):
        model = cls(config).eval()
    model.native_step_enabled = False  # the C++ step needs all weights at once
    shapes = model.state_dict()
    streamed = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for name, module in streamed.items():
        replacement = _StreamedLinear if isinstance(module, nn.Linear) else _StreamedEmbedding
        model.set_submodule(name, replacement(tensors[f"{name}.weight"], module.weight.shape))
    rest = {name: tensors[name].read().float().reshape(shapes[name].shape) for name in model.state_dict()}
    model.load_state_dict(rest, assign=True)
    logits: Tensor = model(sample_tokens(config.vocab_size))[0]
    return logits


class _StreamedLinear(nn.Module):
    """A `Linear` whose weight [out, in] stays in its file: some of its rows are converted to float32 at a time."""

    def __init__(self, weight: LazyTensor, shape: torch.Size):
        super().__init__()
        self.lazy_weight, self.shape = weight, shape

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lazy_weight.read().reshape(self.shape)
        n_rows = max(1, CHUNK // self.shape[1])
        return torch.cat([F.linear(x, rows.float().contiguous()) for rows in weight.split(n_rows)], dim=-1)


class _StreamedEmbedding(_StreamedLinear):
    """An `Embedding` whose weight [V, C] stays in its file."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lazy_weight.read().reshape(self.shape)[x].float()
