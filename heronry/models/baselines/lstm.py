"""LSTM: torch's own, layers stacked, forget gates initially open (Jozefowicz et al., 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Linear, embedding
from .base import Baseline


@dataclass(frozen=True)
class LSTMConfig:
    vocab_size: int
    n_layer: int
    n_embd: int  # of the embedding
    hidden: int  # cells of a layer


class LSTM(Baseline):
    """`logits, state = model(tokens, state)`: tokens [B, T], logits [B, T, V] (with last_only [B, 1, V]),
    state (h, c), each [layers, B, hidden], or None."""

    name = "lstm"
    Config = LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.emb = embedding(config)
        self.lstm = nn.LSTM(config.n_embd, config.hidden, config.n_layer, batch_first=True)
        self.head = Linear(config.hidden, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Any]:
        self.check_windows(cu_seqlens)
        y, state = self.lstm(self.emb(tokens), state)
        return self.head(y[:, -1:] if last_only else y), state

    @torch.no_grad()
    def init_weights(self) -> None:
        """With smaller embeddings or heads it predicts mere token frequencies for hundreds of steps."""
        nn.init.normal_(self.emb.weight)
        nn.init.normal_(self.head.weight, std=self.config.hidden**-0.5)
        for name, p in self.lstm.named_parameters():
            if p.ndim == 1:
                p.zero_()
                if "_ih_" in name:  # of the two biases one is enough
                    p[self.config.hidden : 2 * self.config.hidden] = 1
            elif "_hh_" in name:
                for gate in p.split(self.config.hidden):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_uniform_(p)
