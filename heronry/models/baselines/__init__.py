"""Baselines that RWKV is compared with, trained by the same loop: plain LSTM, GPT, AFT and ViT.

They are for comparisons, not for checkpoints of others: `heronry.load` knows none of them.
"""

from .aft import AFTFull, AFTFullConfig, AFTSimple, AFTSimpleConfig
from .gpt import GPT, GPTConfig
from .lstm import LSTM, LSTMConfig
from .transformer import Cache
from .vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "LSTM",
    "AFTFull",
    "AFTFullConfig",
    "AFTSimple",
    "AFTSimpleConfig",
    "Cache",
    "GPTConfig",
    "LSTMConfig",
    "ViT",
    "ViTConfig",
]
