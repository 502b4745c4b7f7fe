"""Models of equal size: every generation of RWKV and what it is compared with, at the same number of parameters.

All have the same depth and width. How wide the feed-forward part is (in the LSTM: how many cells there are) makes up
for what the others have in their attention.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..models import RWKV4, RWKV5, RWKV6, RWKV7, Model, RWKV4Config, RWKV5Config, RWKV6Config, RWKV7Config
from ..models.baselines import (
    GPT,
    LSTM,
    AFTFull,
    AFTFullConfig,
    AFTSimple,
    AFTSimpleConfig,
    GPTConfig,
    LSTMConfig,
)

VOCABULARY = 256  # bytes
BIAS_RANK = 32  # of AFT-full
LSTM_LAYERS = 2
STEP = 4  # of the widths that are tried
CLASSES: dict[str, type[Model]] = {
    "RWKV-7": RWKV7,
    "RWKV-6": RWKV6,
    "RWKV-5.2": RWKV5,
    "RWKV-4": RWKV4,
    "GPT": GPT,
    "AFT-full": AFTFull,
    "AFT-simple": AFTSimple,
    "LSTM": LSTM,
}
NAMES = tuple(CLASSES)


def equal_configs(layers: int, width: int, ctx_len: int) -> dict[str, Any]:
    """The configuration of each model by name, as near as it comes to the parameters of an RWKV-7 of `layers` layers
    and `width` channels, a multiple of 64. ctx_len: the positions that AFT-full has biases for."""
    size, v = (layers, width), VOCABULARY
    constructors: dict[str, Callable[[int], Any]] = {
        "RWKV-6": lambda n: replace(RWKV6Config.sized(v, *size), dim_ffn=n),
        "RWKV-5.2": lambda n: replace(RWKV5Config.sized(v, *size), dim_ffn=n),
        "RWKV-4": lambda n: replace(RWKV4Config.sized(v, *size), dim_ffn=n),
        "GPT": lambda n: GPTConfig(v, *size, n),
        "AFT-full": lambda n: AFTFullConfig(v, *size, n, ctx_len, BIAS_RANK),
        "AFT-simple": lambda n: AFTSimpleConfig(v, *size, n),
        "LSTM": lambda n: LSTMConfig(v, LSTM_LAYERS, width, n),
    }
    target = RWKV7Config.sized(v, *size)
    wanted = count_parameters("RWKV-7", target)
    configs: dict[str, Any] = {"RWKV-7": target}
    for name, constructor in constructors.items():

        def parameters(n: int, name: str = name, constructor: Callable[[int], Any] = constructor) -> int:
            return count_parameters(name, constructor(n))

        widths = range(STEP, 16 * width, STEP)
        at = bisect_left(widths, wanted, key=parameters)
        near = widths[max(at - 1, 0) : at + 1]
        configs[name] = constructor(min(near, key=lambda n: abs(parameters(n) - wanted)))
    return {name: configs[name] for name in NAMES}


def count_parameters(name: str, config: Any) -> int:
    """No memory is allocated for them."""
    with torch.device("meta"):
        return CLASSES[name](config).num_parameters()


def build_model(name: str, config: Any) -> Model:
    """A new model with the weights that training begins with, the same ones every time."""
    torch.manual_seed(0)
    model = CLASSES[name](config)
    model.init_weights()
    return model


def with_positions(config: Any, positions: int) -> Any:
    """The same for texts of this length: AFT-full, which has biases for each position, gets tables of that size."""
    return replace(config, ctx_len=positions) if isinstance(config, AFTFullConfig) else config
