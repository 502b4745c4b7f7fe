"""Sampling that was found good, by name: `llm.generate(..., sampling="tools")`."""

from __future__ import annotations

from ..errors import unknown_name
from .sampling import Sampling

PRESETS = {
    # conversations: rwkv.cn, and API_DEMO_CHAT of the PyPI package rwkv; what most chat templates have
    "chat": Sampling(top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5, penalize_digits=False),
    # BlinkDL's demonstration with Gradio
    "gradio": Sampling(top_p=0.5, presence_penalty=1, frequency_penalty=0.1, penalty_decay=0.99),
    # answers behind "<think", and behind an empty thought: the evaluation of rwkv-rs
    "open-think": Sampling(
        temperature=0.96, top_p=0.76, top_k=32, presence_penalty=1, frequency_penalty=0.1, penalty_decay=0.988
    ),
    "fake-think": Sampling(top_p=0.28, top_k=32),
    # rwkv_lightning_cuda
    "lightning": Sampling(top_p=0.3, top_k=20, presence_penalty=2, frequency_penalty=0.2),
    # calls of tools, where penalties spoil the JSON: RWKV-Agent, its best and its steadiest
    "tools": Sampling(temperature=0.3, top_p=0.5, penalty_decay=1),
    "tools-stable": Sampling(top_p=0.3, top_k=20, penalty_decay=1),
    # rwkv.cn for the rest; the penalties of "conservative" are RWKV_APP's
    "function-call": Sampling(top_p=0.3, presence_penalty=0.1, frequency_penalty=0.1),
    "maths": Sampling(temperature=0.3, top_p=0.3),
    "creative": Sampling(temperature=0.6, top_p=0.8, presence_penalty=2, frequency_penalty=0.2, penalty_decay=0.99),
    "conservative": Sampling(temperature=0.4, top_p=0.4, presence_penalty=1, frequency_penalty=0.1, penalty_decay=0.99),
    "fixed": Sampling(temperature=0),
}


def preset_by_name(name: str) -> Sampling:
    """Raises InputError if there is no such preset."""
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("sampling preset", name, PRESETS, param="preset")
    return PRESETS[name]
