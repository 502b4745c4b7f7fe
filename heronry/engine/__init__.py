"""Turning logits into tokens and, from text_model.py up, tokens into text."""

from .completion import Completion, FinishReason, TokenLogprob, Usage
from .generate import Event, Generation, Result, generate, prefill
from .sampling import Mask, Sampler, Sampling, probabilities

__all__ = [
    "Completion",
    "Event",
    "FinishReason",
    "Generation",
    "Mask",
    "Result",
    "Sampler",
    "Sampling",
    "TokenLogprob",
    "Usage",
    "generate",
    "prefill",
    "probabilities",
]
