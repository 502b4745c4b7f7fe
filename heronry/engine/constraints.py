"""Constrained decoding: texts that follow a JSON Schema, a regular expression, a list of choices or a grammar.

- llguidance does the work, and is imported at the first constrained text: `pip install 'heronry[serve]'`
- it works on bytes, so it takes tokens that end within a character, as World has them
- what must come next whatever the model says is not drawn: see `Matcher.forced`
- it bounds what a grammar may cost, and ends a text that would cost more with an error. But rules within rules it
  follows by recursion, and a stack that overflows ends the process: grammars are compiled on a large one, and their
  size is bounded
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, count, show
from ..text.tokenizers import HFTokenizer, Tokenizer
from ..text.utf8 import encode_utf8

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["schema", "regex", "choices", "grammar"]
LARGEST = {"schema": 1 << 18, "regex": 1 << 16, "choices": 1 << 16, "grammar": 1 << 16}  # characters
STACK = 1 << 28  # bytes; the deepest schemas of this size need a quarter of it
MAX_STATES = 50_000  # of the lexer of one text, at some 2 kB
WHITESPACE = " "  # within JSON, where it may be: at most this, for small models that write on and on of it
GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")
SNIPPET = re.compile(r"^\s*(\d+ \||\^+$)")  # lines of a message that show the grammar

_stack_size = threading.Lock()  # held while that of new threads is changed


@dataclass(frozen=True)
class Grammar:
    """What a text must look like. Made by `from_schema`, `from_regex`, `from_choices` or `from_text`.

    kind, source: one of the four, and its text.
    opening: what the text begins with already, at the end of the prompt.
    leading_space: a space or a newline may come first.
    after_thought: the model thinks first: any text up to "</think>" comes before.
    """

    kind: Kind
    source: str
    opening: str = ""
    leading_space: bool = False
    after_thought: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"the kind of a grammar is one of {', '.join(get_args(Kind))}, got {show(self.kind)}")
        for name, text in ((self.kind, self.source), ("opening", self.opening)):
            if not isinstance(text, str):
                raise InputError(f"{name} must be a text, got {show(text)}")
            encode_utf8(text)
        if len(self.source) > LARGEST[self.kind]:
            size = count(len(self.source), "character")
            raise InputError(f"{self.kind} has {size}; at most {LARGEST[self.kind]:,} are taken")

    @classmethod
    def from_schema(cls, schema: Any, *, compact: bool = False) -> Grammar:
        """JSON that is valid under a JSON Schema, its properties in the schema's order; a space or a newline may come
        first.

        schema: a dict, its JSON, a class with `model_json_schema()` such as pydantic's, or True for any object. White
            space is up to its "x-guidance", if it has that (see llguidance).
        compact: without white space: fewer tokens, and more of them forced.
        """
        if schema is True:
            schema = {"type": "object"}
        elif hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(schema, Mapping):
                raise InputError(f"schema must be a JSON Schema, as a dict or its JSON, or True, got {show(schema)}")
            space = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
            return cls("schema", json.dumps({"x-guidance": space, **schema}, allow_nan=False), leading_space=True)
        except InputError:
            raise
        except RecursionError:
            raise InputError("schema is nested too deeply") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"schema is not JSON: {error}") from None

    @classmethod
    def from_regex(cls, pattern: str) -> Grammar:
        """Texts that a regular expression matches from end to end; in the syntax of Rust, without look-around."""
        return cls("regex", pattern)

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Grammar:
        """One of some texts."""
        if not isinstance(choices, Sequence) or not all(isinstance(x, str) for x in choices):
            raise InputError(f"choices must be a list of texts, got {show(choices)}")
        if isinstance(choices, str) or not choices or "" in choices:
            raise InputError(f"choices must be a list of texts, none of them empty, got {show(choices)}")
        for choice in choices:
            encode_utf8(choice)
        return cls("choices", json.dumps(list(choices)))

    @classmethod
    def from_text(cls, text: str) -> Grammar:
        """A grammar in Lark's syntax, as llguidance takes it (`start: ...`), or llama.cpp's GBNF (`root ::= ...`)."""
        return cls("grammar", text)

    def in_answer(self, written: str) -> Grammar:
        """For an answer in a chat of which so much is written: a space may come first, and before that a thought, if
        one has begun."""
        thinks = self.after_thought or written.lstrip().startswith("<think")
        return replace(self, opening=written + self.opening, leading_space=True, after_thought=thinks)

    def matcher(self, tokenizer: Tokenizer, vocab_size: int) -> Matcher:
        """A matcher that has seen nothing but the opening.

        vocab_size: of the model, V.

        Raises:
            InputError: what llguidance says against it, an opening that does not fit, or no llguidance.
        """
        table = token_table(tokenizer)  # type: ignore[arg-type]  # tokenizers can be hashed, like any object
        native = _compile(table, self.definition())
        if native.is_error():
            reason = _in_one_line(native.get_error())
            if self.kind != "grammar":  # the place is that in what was made of it
                reason = re.sub(r"^(at )?\d+\(\d+\): ", "", reason)
            raise InputError(f"{self.kind}: {reason}")
        matcher = Matcher(native, tokenizer.vocab_size, vocab_size)
        if self.opening:
            matcher.read_opening(table, self.opening)
        if not matcher.complete and not matcher.allowed().any():
            raise InputError(f"this tokenizer cannot write what the {self.kind} asks for")
        return matcher

    def definition(self) -> str:
        """For llguidance, one line of JSON: the grammar, and what comes before it."""
        from llguidance import LLMatcher

        if self.kind == "schema":
            try:
                native = LLMatcher.grammar_from_json_schema(self.source)
            except ValueError as error:
                raise InputError(f"schema: {_in_one_line(error)}") from None
            [inner] = json.loads(native)["grammars"]
        elif self.kind == "regex":
            [inner] = json.loads(LLMatcher.grammar_from_regex(self.source))["grammars"]
        elif self.kind == "choices":
            inner = {"lark_grammar": "start: " + " | ".join(map(json.dumps, json.loads(self.source)))}
        else:
            inner = {"lark_grammar": _convert_gbnf(self.source) if GBNF.search(self.source) else self.source}
        start, rules = "@text", ""
        if self.leading_space:
            start, rules = f"SPACE? {start}", "SPACE: /[ \\n]/\n"
        if self.after_thought:  # with stop= in place of suffix=, no token that goes beyond the end would be allowed
            start, rules = f"thought {start}", f'{rules}thought[suffix="</think>"]: /(.|\\n)*/\n'
        outer = {"lark_grammar": f"start: {start}\n{rules}"}
        return json.dumps({"grammars": [outer, {**inner, "name": "text"}]})


class Matcher:
    """Follows one text through a grammar, token by token.

    What llguidance knows to be the end of a text is an id of its own, behind all others; which ids end it is up to the
    caller.
    """

    def __init__(self, native: LLMatcher, end: int, vocab_size: int):
        """end: that id; vocab_size: of the model, V."""
        self._native, self._end, self._size = native, end, vocab_size
        self._mask: Tensor | None = None  # of the next token, once it is known

    def copy(self) -> Matcher:
        """Another one that stands where this one does."""
        return Matcher(self._native.deep_copy(), self._end, self._size)

    @property
    def complete(self) -> bool:
        """The text may end here."""
        return bool(self._native.is_accepting())

    @property
    def ended(self) -> bool:
        """The text may end here, and nothing more can come."""
        return self.complete and (self._native.is_stopped() or not self._find_mask().any())

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool [V], without those that end a text; not to be changed.

        Raises:
            InputError: finding out would cost too much.
        """
        mask = self._find_mask()
        self._check()
        return mask

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model says: they write the text that the grammar leaves no choice
        about, cut into tokens as the tokenizer does it."""
        if self.complete:
            return []
        tokens = self._native.compute_ff_tokens()
        self._check()
        return tokens[: self._native.validate_tokens(tokens)]

    def consume(self, token: int) -> None:
        """The text goes on with this token.

        Raises:
            InputError: it is not allowed, or following it would cost too much.
        """
        self._mask = None
        self._native.consume_token(token)
        self._check()

    def read_opening(self, table: LLTokenizer, opening: str) -> None:
        """The text goes on with this one; InputError if the grammar does not allow it."""
        self._mask = None
        tokens = table.greedy_tokenize(opening)
        if self._native.try_consume_tokens(tokens) < len(tokens):
            raise InputError(f"the grammar does not allow a text that begins with {show(opening)}")

    def _find_mask(self) -> Tensor:
        if self._mask is None:
            bits = np.frombuffer(self._native.compute_bitmask(), np.uint8)
            found = np.unpackbits(bits, count=self._end, bitorder="little").view(bool)
            self._mask = torch.zeros(self._size, dtype=torch.bool, device="cpu")  # [V], without the end
            self._mask[: self._end] = torch.from_numpy(found)
        return self._mask

    def _check(self) -> None:
        if self._native.is_error():
            reason = _in_one_line(self._native.get_error())
            if reason.startswith("NoExtension"):
                raise InputError("there is no text that the grammar allows")
            raise InputError(f"the grammar cannot be followed any further: {reason}")


@lru_cache(maxsize=8)
def token_table(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokens of a tokenizer for llguidance, sorted once (0.2 s for World)."""
    try:
        from llguidance import LLTokenizer
    except ModuleNotFoundError:
        raise InputError("constrained texts need llguidance: pip install 'heronry[serve]'") from None
    from llguidance._tokenizer import TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size + 1)


class _Vocabulary:
    """A tokenizer as llguidance wants it: the bytes of each id, none for those without text, and how text is cut."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        self.eos_token_id = size
        self.special_token_ids = [size]
        if isinstance(tokenizer, HFTokenizer):
            tokens, self._encode = _read_json(tokenizer)
        else:
            tokens = list(getattr(tokenizer, "vocabulary", ()))
            if not tokens:  # nothing can be known of tokens within a character
                texts = [tokenizer.decode([i]) for i in range(size)]
                tokens = [b"" if "\ufffd" in text else text.encode() for text in texts]
            self._encode = lambda text: tokenizer.encode(text.decode())
        self.tokens = [*(b"" if i in tokenizer.stop_ids else token for i, token in enumerate(tokens)), b"<end>"]

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


def _read_json(tokenizer: HFTokenizer) -> tuple[list[bytes], Callable[[bytes], list[int]]]:
    """The bytes of each id, and the function that cuts text, without the space that some put in front of it."""
    from llguidance import LLTokenizer

    try:
        table = LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.end_of_text_id)
    except ValueError as error:
        raise InputError(f"llguidance does not know this kind of tokenizer.json: {_in_one_line(error)}") from None
    ids = range(tokenizer.vocab_size)
    return [b"" if table.is_special_token(i) else table.decode_bytes([i]) for i in ids], table.tokenize_bytes


def _compile(table: LLTokenizer, definition: str) -> LLMatcher:
    """In a thread, for the sake of its stack."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_STATES, verbose_errors=False)
    found: list[LLMatcher] = []
    thread = threading.Thread(
        target=lambda: found.append(LLMatcher(table, definition, log_level=0, limits=limits)), name="heronry-grammar"
    )
    with _stack_size:
        usual = threading.stack_size(STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return found[0]


def _convert_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise InputError("grammar is nested too deeply") from None
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"grammar: {_in_one_line(error)}") from None


def _in_one_line(message: object) -> str:
    """What llguidance says, without the pictures."""
    text, _, _ = str(message).partition("\n<")
    line = " ".join(line.strip() for line in text.splitlines() if line.strip() and not SNIPPET.match(line))
    return line if len(line) <= 300 else f"{line[:300]}..."
