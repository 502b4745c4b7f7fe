"""The keyword options of generating text: their types for editors and type checkers, and their check at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from ..errors import InputError
from ..models import State
from ..progress import Progress
from ..text.tokenizers import Tokenizer
from .sampling import Mask, Sampling, SamplingOptions, UnseededOptions

Prompt = str | Sequence[int]  # a text, or token ids that are read as they are
Prompts = list[str] | list[list[int]] | list[Prompt]  # lists, because a str is a sequence of str too


class DecodeOptions(UnseededOptions, total=False):
    """How tokens are drawn, and when it ends.

    sampling: a Sampling for all prompts, or one a prompt; the options below replace its fields.
    seed: one for all prompts, where completion j of `n` takes seed + j; or one a completion, prompt by prompt.
    min_tokens: an end of text or a stop comes only after so many tokens; stop strings are looked for behind them.
    stop_token_ids: ids that end the text like an end of text.
    ignore_eos: go on after an end of text, up to max_tokens.
    logprobs: return the log-probability of every token.
    top_logprobs: and of so many of the most likely ones at its step.
    mask: called before each token with the ids generated so far; returns the tokens allowed next, bool [V], or None
        for all. One for all prompts, or one a completion. It comes after penalties and bias.
    All others are fields of `Sampling`.
    """

    sampling: Sampling | Sequence[Sampling] | None
    seed: int | Sequence[int] | None
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    mask: Mask | Sequence[Mask | None] | None


class GenerateOptions(DecodeOptions, total=False):
    """Also where to begin and where to end.

    state: go on from here (see `LLM.state`): a row for each prompt, or one for all.
    stop: strings that end the text; they are not part of it.
    progress: called while the prompts are read, with (tokens read, tokens in all).
    """

    state: State | None
    stop: str | Sequence[str] | None
    progress: Progress | None


@dataclass(frozen=True)
class Decoding:
    """Checked options of a batch of `rows` sequences."""

    samplings: list[Sampling]  # one a row
    masks: list[Mask | None]  # one a row
    min_tokens: int
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    top_logprobs: int | None  # None: no logprobs

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """All ids that end a text."""
        return self.stop_token_ids | (frozenset() if self.ignore_eos else tokenizer.stop_ids)


def resolve(options: Mapping[str, Any], default: Sampling, prompts: int, n: int = 1) -> Decoding:
    """Checks `DecodeOptions` for `n` completions of so many prompts. default: the Sampling where none is given.

    Raises:
        InputError: an unknown option, or a value of a wrong type or out of range.
    """
    options = dict(options)
    rows = prompts * n
    given = options.pop("sampling", None)
    one_each = _each("sampling", default if given is None else given, Sampling, prompts, "prompt")
    seed = options.pop("seed", None)
    mask = options.pop("mask", None)
    min_tokens = _count("min_tokens", options.pop("min_tokens", 0))
    top = _count("top_logprobs", options.pop("top_logprobs", 0))
    logprobs = _flag("logprobs", options.pop("logprobs", False))
    ignore_eos = _flag("ignore_eos", options.pop("ignore_eos", False))
    stop_ids = options.pop("stop_token_ids", ())
    if not isinstance(stop_ids, Sequence | frozenset | set) or isinstance(stop_ids, str):
        raise InputError(f"stop_token_ids must be a list of token ids, got {stop_ids!r}")
    for token in stop_ids:
        _count("a token in stop_token_ids", token)
    unknown = [name for name in options if name not in SamplingOptions.__annotations__]
    if unknown:
        names = ["max_tokens", "n", "stream", *GenerateOptions.__annotations__]
        close = get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"
        raise InputError(f"unknown option {unknown[0]!r}; {hint}")
    samplings = [one_each[i // n].replace(**options) for i in range(rows)]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise InputError(f"seed has {len(seed)} values for {rows} completions")
        samplings = [sampling.replace(seed=x) for sampling, x in zip(samplings, seed, strict=True)]
    else:
        if seed is not None:
            samplings = [sampling.replace(seed=seed) for sampling in samplings]
        samplings = [x if x.seed is None else x.replace(seed=int(x.seed) + i % n) for i, x in enumerate(samplings)]
    masks = list(mask) if isinstance(mask, Sequence) and not isinstance(mask, str) else [mask] * rows
    if len(masks) != rows or not all(m is None or callable(m) for m in masks):
        raise InputError(f"mask must be a function, or a list of {rows} functions, got {mask!r}")
    return Decoding(
        samplings, masks, min_tokens, frozenset(map(int, stop_ids)), ignore_eos, top if logprobs or top else None
    )


def _each(name: str, value: Any, kind: type, count: int, what: str) -> list[Any]:
    values = [value] * count if isinstance(value, kind) else value
    if not isinstance(values, Sequence) or not all(isinstance(x, kind) for x in values):
        raise InputError(f"{name} must be a {kind.__name__} or a list of them, got {value!r}")
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} values for {count} {what}s")
    return list(values)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} must be a whole number of at least 0, got {value!r}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return value
