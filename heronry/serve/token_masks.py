"""Which tokens may be written, where a request names them or words that it does not want."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.sampling import Mask
from ..text.tokenizers import Tokenizer
from .errors import ApiError


def make_mask(
    allowed: Sequence[int] | None, bad_words: Sequence[str] | None, tokenizer: Tokenizer, vocab_size: int
) -> Mask | None:
    """
    Args:
        allowed: token ids; all others are banned. None: all are allowed.
        bad_words: whose last token does not follow the others of it, with a space in front or not.

    Raises:
        ApiError: no token is allowed, an id is not in the vocabulary, or a word is empty.
    """
    if allowed is None and not bad_words:
        return None
    base = torch.full((vocab_size,), allowed is None)  # bool [V]
    if allowed is not None:
        if not allowed or min(allowed) < 0 or max(allowed) >= vocab_size:
            raise ApiError(400, f"give token ids from 0 to {vocab_size - 1}", "allowed_token_ids")
        base[list(allowed)] = True
    if bad_words and not all(word.strip() for word in bad_words):
        raise ApiError(400, "a word must not be empty", "bad_words")
    spelt = [form for word in bad_words or () for form in (word.lstrip(), f" {word.lstrip()}")]
    words = [tokenizer.encode(word) for word in spelt]

    def mask(drawn: list[int]) -> Tensor:
        banned = [last for *begun, last in words if drawn[len(drawn) - len(begun) :] == begun]
        if not banned:
            return base
        left = base.clone()
        left[banned] = False
        return left

    return mask
