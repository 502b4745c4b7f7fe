"""Turning logits into tokens and, in llm.py and chat.py alone, tokens into text."""

from .generate import Event, Generation, Result, generate, prefill
from .sampling import Sampler, Sampling, probabilities

__all__ = ["Event", "Generation", "Result", "Sampler", "Sampling", "generate", "prefill", "probabilities"]
