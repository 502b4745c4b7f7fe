"""Tokens and their log-probabilities as the APIs name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from ..engine.completion import TokenLogprob
from ..text.tokenizers import Tokenizer, bytes_of, spell

PROMPT_LOGPROBS: Any = Field(None, ge=0, le=20, description="of the prompt's tokens too, with so many of the best")
UNLIKELY = -9999.0  # in place of minus infinity, which JSON does not have


class TokenNames:
    """Names of the tokens of one vocabulary, each different: pieces of characters are called by their bytes.

    as_ids: "token_id:123" for every one, as vLLM offers it.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False):
        self.tokenizer, self.as_ids = tokenizer, as_ids

    def __call__(self, token: int) -> str:
        if self.as_ids:
            return f"token_id:{token}"
        if token in self.tokenizer.stop_ids:
            return END_OF_TEXT
        text = self.tokenizer.decode([token])
        return f"bytes:{spell(self.tokenizer, token)}" if "\ufffd" in text else text

    def text(self, token: int) -> str:
        """What a token adds to a text."""
        return "" if token in self.tokenizer.stop_ids else self.tokenizer.decode([token])

    def top(self, entry: TokenLogprob) -> dict[str, float]:
        """The most likely tokens of a step, and the one that was drawn."""
        found = {self(token): finite(x) for token, x in entry.top_logprobs.items()}
        return found | {self(entry.token_id): finite(entry.logprob)}


END_OF_TEXT = "<|endoftext|>"


def finite(logprob: float) -> float:
    return max(logprob, UNLIKELY)


def columns(names: TokenNames, entries: Iterable[TokenLogprob | int], offset: int) -> tuple[dict[str, Any], int]:
    """Log-probabilities as /v1/completions has them, and the offset after them.

    entries: an id in place of one without a log-probability: the first token of a text.
    offset: in characters, of the first token.
    """
    tokens, logprobs, top, offsets = [], [], [], []
    for entry in entries:
        token = entry if isinstance(entry, int) else entry.token_id
        tokens.append(names(token))
        logprobs.append(None if isinstance(entry, int) else finite(entry.logprob))
        top.append(None if isinstance(entry, int) else names.top(entry))
        offsets.append(offset)
        offset += len(names.text(token))
    found = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}
    return found, offset


def prompt_column(names: TokenNames, entries: Iterable[TokenLogprob]) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt as vLLM has them: by token id, that of the prompt first; None of its first."""
    column: list[dict[str, Any] | None] = [None]
    for entry in entries:
        found = {entry.token_id: (entry.logprob, entry.rank)}
        found |= {token: (x, rank) for rank, (token, x) in enumerate(entry.top_logprobs.items(), 1)}
        column.append(
            {
                str(token): {"logprob": finite(x), "rank": rank, "decoded_token": names.text(token)}
                for token, (x, rank) in found.items()
            }
        )
    return column


def chat_logprob(names: TokenNames, entry: TokenLogprob) -> dict[str, Any]:
    """One token as /v1/chat/completions has it."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names(token), "logprob": finite(logprob), "bytes": list(bytes_of(names.tokenizer, token))}

    top = [one(token, x) for token, x in entry.top_logprobs.items()]
    return one(entry.token_id, entry.logprob) | {"top_logprobs": top}
