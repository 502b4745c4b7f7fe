"""The keyword options of generating text: their types for editors and type checkers, and their check at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, show, unknown_name
from ..models import State
from ..progress import Progress
from ..text.tokenizers import Tokenizer
from ..text.tools import Tools
from .constraints import Grammar, Matcher
from .presets import preset_by_name
from .sampling import Mask, Sampling, UnseededOptions

Prompt = str | Sequence[int]  # a text, or token ids that are read as they are
# lists and tuples, because a str is a sequence of str too
Prompts = list[str] | list[list[int]] | list[str | list[int]] | list[Prompt] | tuple[Prompt, ...]


class DecodeOptions(UnseededOptions, total=False):
    """How tokens are drawn, and when it ends.

    sampling: a Sampling, or the name of one in heronry.engine.presets.PRESETS, for all prompts or one a prompt; the
        options below replace its fields.
    seed: one for all prompts, where completion j of `n` takes seed + j; or one a completion, prompt by prompt.
    min_tokens: an end of text or a stop comes only after so many tokens; stop strings are looked for behind them.
    stop_token_ids: ids that end the text like an end of text.
    ignore_eos: go on after an end of text, up to max_tokens.
    logprobs: return the log-probability of every token.
    top_logprobs: and of so many of the most likely ones at its step.
    mask: called before each token with the ids generated so far; returns the tokens allowed next, bool [V], or None
        for all. One for all prompts, or one a completion. It comes after penalties and bias.
    schema, regex, choices, grammar: what every text must look like, one of them at most; see `Grammar.from_schema` and
        the others. A grammar is a text in Lark's syntax or GBNF, or a `Grammar`. In a chat it is about the whole
        answer, its `beginning` included and its thought apart. A text that ends with "length" may be incomplete.
    All others are fields of `Sampling`.
    """

    sampling: Sampling | str | Sequence[Sampling | str] | None
    seed: int | Sequence[int] | None
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    mask: Mask | Sequence[Mask | None] | None
    schema: Mapping[str, object] | str | bool | type | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | Grammar | None


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """InputError for the first of these options that is not among the known ones."""
    known = list(known)
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)


class GenerateOptions(DecodeOptions, total=False):
    """Also where to begin and where to end.

    state: go on from here (see `LLM.state`): a row for each prompt, or one for all.
    adapter: one of `LLM.adapters` by its name, for all prompts, or a list with one (or None) a prompt.
    stop: strings that end the text; they are not part of it.
    progress: called while the prompts are read, with (tokens read, tokens in all).
    """

    state: State | None
    adapter: str | Sequence[str | None] | None
    stop: str | Sequence[str] | None
    progress: Progress | None


class ChatOptions(DecodeOptions, total=False):
    """Also how messages are shown, and how the answer is taken apart; see `heronry.text.chat_templates.render`.

    tools: that may be called: OpenAI's list of tools, or the JSON Schema of their arguments by name.
    tool_style: how tools are shown; None = as the name of the model's file says, or the template.
    parallel_tool_calls: False ends the answer with its first call.
    think: "none", "open", "short", "medium", "long", "fake", ...; None = as the template has it.
    opening: what the answer begins with: "plain", "fence", "call" or a text; None = by `think` and the tools.
    preserve_reasoning: thoughts of all earlier answers are shown.
    stop: strings that end what is said; they are not looked for in the thought and in calls.
    """

    tools: Tools | None
    tool_style: str | None
    parallel_tool_calls: bool
    think: str | None
    opening: str | None
    preserve_reasoning: bool
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class Decoding:
    """Checked options of a batch of `rows` sequences."""

    max_tokens: int
    samplings: list[Sampling]  # one a row
    masks: list[Mask | None]  # one a row
    min_tokens: int
    stop_token_ids: frozenset[int]
    ignore_eos: bool
    top_logprobs: int | None  # None: no logprobs
    grammar: Grammar | None

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """All ids that end a text."""
        return self.stop_token_ids | (frozenset() if self.ignore_eos else tokenizer.stop_ids)

    def matcher(self, tokenizer: Tokenizer, vocab_size: int, written: str | None = None) -> Matcher | None:
        """Of the grammar, where there is one. written: of an answer in a chat, so far.

        Raises:
            InputError: see `Grammar.matcher`.
        """
        if self.grammar is None:
            return None
        grammar = self.grammar if written is None else self.grammar.in_answer(written)
        return grammar.matcher(tokenizer, vocab_size)


def resolve(
    options: Mapping[str, Any], max_tokens: int, default: Sampling, vocab_size: int, prompts: int, n: int = 1
) -> Decoding:
    """Checks the values of `DecodeOptions` and `max_tokens` for `n` completions of so many prompts.

    default: the Sampling where none is given.

    Raises:
        InputError: a value of a wrong type or out of range.
    """
    options = dict(options)
    rows = prompts * n
    given = options.pop("sampling", None)
    if isinstance(given, str):
        given = preset_by_name(given)
    elif isinstance(given, Sequence):
        given = [preset_by_name(x) if isinstance(x, str) else x for x in given]
    one_each = _each("sampling", default if given is None else given, Sampling, prompts, "prompt")
    seed = options.pop("seed", None)
    mask = options.pop("mask", None)
    grammar = _choose_grammar(options)
    min_tokens = whole_number("min_tokens", options.pop("min_tokens", 0))
    top = whole_number("top_logprobs", options.pop("top_logprobs", 0))
    logprobs = flag("logprobs", options.pop("logprobs", False))
    ignore_eos = flag("ignore_eos", options.pop("ignore_eos", False))
    stop_ids = options.pop("stop_token_ids", ())
    if not isinstance(stop_ids, Sequence | frozenset | set) or isinstance(stop_ids, str | bytes):
        raise InputError(f"stop_token_ids must be a list of token ids, got {show(stop_ids)}")
    for token in stop_ids:
        _check_token("a token in stop_token_ids", token, vocab_size)
    samplings = [one_each[i // n].replace(**options) for i in range(rows)]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != rows:
            raise InputError(f"seed has {len(seed)} values for {rows} completions")
        samplings = [sampling.replace(seed=x) for sampling, x in zip(samplings, seed, strict=True)]
    else:
        if seed is not None:
            samplings = [sampling.replace(seed=seed) for sampling in samplings]
        samplings = [x if x.seed is None else x.replace(seed=int(x.seed) + i % n) for i, x in enumerate(samplings)]
    for token in {token for sampling in samplings for token in sampling.logit_bias}:
        _check_token("a token in logit_bias", token, vocab_size)
    masks = list(mask) if isinstance(mask, Sequence) and not isinstance(mask, str) else [mask] * rows
    if len(masks) != rows or not all(m is None or callable(m) for m in masks):
        raise InputError(f"mask must be a function, or a list of {rows} functions, got {show(mask)}")
    return Decoding(
        whole_number("max_tokens", max_tokens),
        samplings,
        masks,
        min_tokens,
        frozenset(map(int, stop_ids)),
        ignore_eos,
        top if logprobs or top else None,
        grammar,
    )


def _choose_grammar(options: dict[str, Any]) -> Grammar | None:
    """Takes the one that is given out of the options."""
    ways: dict[str, Callable[[Any], Grammar]] = {
        "schema": Grammar.from_schema,
        "regex": Grammar.from_regex,
        "choices": Grammar.from_choices,
        "grammar": lambda given: given if isinstance(given, Grammar) else Grammar.from_text(given),
    }
    given = {name: value for name in ways if (value := options.pop(name, None)) is not None}
    if len(given) > 1:
        raise InputError(f"give one of {', '.join(ways)}, not {' and '.join(given)}")
    return next((ways[name](value) for name, value in given.items()), None)


def _each(name: str, value: Any, kind: type, count: int, what: str) -> list[Any]:
    values = [value] * count if isinstance(value, kind) else value
    if not isinstance(values, Sequence) or not all(isinstance(x, kind) for x in values):
        raise InputError(f"{name} must be a {kind.__name__} or a list of them, got {show(value)}")
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} values for {count} {what}s")
    return list(values)


def whole_number(name: str, value: Any, least: int = 0) -> int:
    """The value as an int; InputError if it is none or less than `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {show(value)}")
    return int(value)


def _check_token(name: str, value: Any, vocab_size: int) -> None:
    if whole_number(name, value) >= vocab_size:
        raise InputError(f"{name} must be below {vocab_size}, the size of the vocabulary, got {value}")


def read_stops(stop: object) -> tuple[str, ...]:
    """The stop strings; InputError if they are none."""
    if not isinstance(stop, str | Sequence | None):
        raise InputError(f"stop must be a text or a list of texts, got {show(stop)}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(x, str) for x in stops):
        raise InputError(f"stop must be a text or a list of texts, got {show(stop)}")
    if "" in stops:
        raise InputError("a stop string must not be empty")
    return stops


def flag(name: str, value: Any) -> bool:
    """The value; InputError if it is neither True nor False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {show(value)}")
    return value
