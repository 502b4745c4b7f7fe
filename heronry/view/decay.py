"""How fast each layer forgets, and how much of the token before it mixes in.

The decay w is what is left of a number in the state after one more token, in (0, 1). Its half-life is the number of
tokens after which half is left, ln 2 / -ln w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..models import Model
from .inside import as_row, operator_calls

# a share of the current token in RWKV-4 and 5, of the previous one in RWKV-6 and 7
MIX_PREFIXES = ("time_mix_", "time_maa_", "x_")
CURRENT = "time_mix_"


class Decays(NamedTuple):
    """
    log_w: [L, A], the log of the decay by one token, of every channel; RWKV-6 and 7: the mean over the text.
    on_text: [L, T, A], RWKV-6 and 7: of every token; None where the decay is the same for all.
    rates: [L, T, A], RWKV-7: the in-context learning rate, the part of what is stored under a key that is replaced.
    mixes: of every mix of the token shift ("att k") [L, C], the share of the previous token; of RWKV-6's time mix
        without what depends on the token.
    """

    log_w: NDArray[Any]
    on_text: NDArray[Any] | None
    rates: NDArray[Any] | None
    mixes: dict[str, NDArray[Any]]

    @property
    def half_lives(self) -> NDArray[Any]:
        """In tokens, [L, A]."""
        tokens: NDArray[Any] = math.log(2) / np.maximum(-self.log_w, 1e-30)
        return tokens


def read_decays(model: Model, tokens: Sequence[int]) -> Decays:
    """tokens: a text on which the decays of RWKV-6 and 7 are taken. Raises InputError for one that is too long."""
    calls = operator_calls(model, as_row(model, tokens))
    rates = None
    on_text = None
    if calls[0].operator == "wkv4":
        log_w = [call.inputs[0] for call in calls]
    elif calls[0].operator == "wkv5":  # of a head [H, 1] or a channel [H, N]
        log_w = [call.inputs[1].expand(call.inputs[0].shape[2:]).flatten() for call in calls]
    else:
        each = [call.inputs[1][0].flatten(1) for call in calls]  # [T, A]
        on_text = _stack(each)
        log_w = [x.float().mean(0) for x in each]
    if calls[0].operator == "wkv7":  # a = -kappa and b = kappa times the rate
        rates = _stack([(call.inputs[5] / -call.inputs[4]).nan_to_num()[0].flatten(1) for call in calls])
    return Decays(_stack(log_w), on_text, rates, token_shift_mixes(model))


def token_shift_mixes(model: Model) -> dict[str, NDArray[Any]]:
    """See `Decays`."""
    mixes: dict[str, list[Tensor]] = {}
    for block in model.blocks:
        for part in ("att", "ffn"):
            for name, mix in getattr(block, part).named_parameters(recurse=False):
                prefix = next((x for x in MIX_PREFIXES if name.startswith(x)), None)
                if prefix is not None and mix.shape[:-1] == (1, 1):
                    share = 1 - mix if prefix == CURRENT else mix
                    mixes.setdefault(f"{part} {name.removeprefix(prefix)}", []).append(share.detach().flatten())
    return {name: _stack(layers) for name, layers in mixes.items()}


def _stack(layers: list[Tensor]) -> NDArray[Any]:
    return np.stack([x.detach().float().cpu().numpy() for x in layers])
