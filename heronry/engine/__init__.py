"""Turning logits into tokens and, from text_model.py up, tokens into text."""

from .completion import Completion, FinishReason, TokenLogprob, Usage
from .constraints import Grammar, Matcher
from .decode_batch import Event
from .draw import probabilities
from .generate import Generation, Result, generate, prefill
from .options import DecodeOptions, GenerateOptions
from .sampling import Mask, Sampler, Sampling
from .text_model import TextModel

__all__ = [
    "Completion",
    "DecodeOptions",
    "Event",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "Grammar",
    "Mask",
    "Matcher",
    "Result",
    "Sampler",
    "Sampling",
    "TextModel",
    "TokenLogprob",
    "Usage",
    "generate",
    "prefill",
    "probabilities",
]
