"""Conversations as training data: messages become token ids and a mask of the tokens that count in the loss.

- a conversation is encoded in the same pieces as by engine/chat.py: a turn is a message with the beginning of its
  answer, as the template shows them; an answer is the rest of the answer with the separator behind it
- the loss counts what the model has to write by itself: the answers, and behind each of them the whole stop text. The
  stop text of world and g1, "\\n\\nUser:", reaches into the next turn
- the last answer is followed by the end of text, or by the stop text if the tokenizer has no such id
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError
from .chat_templates import Template
from .tokenizers import Tokenizer


class Piece(NamedTuple):
    """A text that is encoded by itself. Its first `n_counted` characters count in the loss."""

    text: str
    n_counted: int


def encode_conversation(
    messages: Sequence[Mapping[str, Any]], template: Template, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Encodes a conversation for training.

        from heronry.text.chat_templates import TEMPLATES
        from heronry.text.tokenizers import load_tokenizer

        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        ids, mask = encode_conversation(messages, TEMPLATES["world"], load_tokenizer("world"))

    Args:
        messages: {"role", "content"} of an optional system text, then of user and assistant in turn. A last message
            without an answer is left out. An answer with "weight": 0 is read, but does not count in the loss.
        template: see heronry.text.chat_templates.TEMPLATES.
        tokenizer: its end of text, if it has one, ends the ids.

    Returns:
        ids [n], and for each of them whether its prediction counts in the loss [n].

    Raises:
        InputError: other roles, an empty message, an answer that does not fit the template.
    """
    end = end_of_text(tokenizer)
    ids: list[int] = []
    mask: list[bool] = []
    for piece in render_conversation(messages, template, end is not None):
        piece_ids, n_counted = encode_piece(piece, tokenizer)
        ids += piece_ids
        mask += [i < n_counted for i in range(len(piece_ids))]
    if end is not None:
        ids.append(end)
        mask.append(piece.n_counted > 0)
    return ids, mask


def render_conversation(
    messages: Sequence[Mapping[str, Any]], template: Template, has_end_of_text: bool
) -> list[Piece]:
    """The pieces of a conversation, without the end of text. Arguments and errors as for `encode_conversation`.

    has_end_of_text: whether an end of text will follow; otherwise the stop text is appended.
    """
    turns = [(*_role_and_content(message), message.get("weight") != 0) for message in messages]
    pieces: list[Piece] = []
    if turns and turns[0][0] == "system":
        pieces.append(Piece(template.system.replace("{system}", template.clean(turns.pop(0)[1])), 0))
    if len(turns) < 2 or any(role != ("user", "assistant")[i % 2] for i, (role, *_) in enumerate(turns)):
        raise InputError("the messages do not alternate between user and assistant")
    stop, separator = template.stops[0], template.separator
    n_answers = len(turns) // 2
    for i in range(n_answers):
        turn = template.turn.replace("{user}", template.clean(turns[2 * i][1]))
        # the part of the stop text that is the beginning of this turn
        learned = i > 0 and turns[2 * i - 1][2] and (separator + turn).startswith(stop)
        pieces.append(Piece(turn, max(0, len(stop) - len(separator)) if learned else 0))
        answer = _answer(turns[2 * i + 1][1], template)
        answer += separator if i < n_answers - 1 else "" if has_end_of_text else stop
        pieces.append(Piece(answer, len(answer) if turns[2 * i + 1][2] else 0))
    return pieces


def encode_piece(piece: Piece, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids [n] of a piece, and how many of them, from the first, contain a character that counts in the loss."""
    text, n_counted = piece
    ids = tokenizer.encode(text)
    if n_counted >= len(text):
        return ids, len(ids)
    n, n_decoded, stream = 0, 0, tokenizer.stream()
    while n_decoded < n_counted and n < len(ids):
        n_decoded += len(stream.push(ids[n]))
        n += 1
    return ids, n


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, None if the tokenizer has none.

    Of several stop ids it is the lowest: <|endoftext|> comes before <|im_end|> in every vocabulary.
    """
    return min(tokenizer.stop_ids, default=None)


def _answer(text: str, template: Template) -> str:
    """The part of an answer that follows its beginning in the template: "Assistant:", or some of the thinking too."""
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise InputError("an answer is empty")
    if any(stop in text for stop in template.stops):  # a chat would end the answer there
        text = re.sub("\n+", "\n", text)
    beginning = template.turn.rpartition(":")[2]
    if f" {text}".startswith(beginning):
        return f" {text}"[len(beginning) :]
    if beginning.endswith("</think"):  # the template skips the thinking, so an answer may have none
        return f">\n{text}"
    raise InputError(f"an answer does not begin with {beginning.strip()!r}, as the template does")


def _role_and_content(message: Mapping[str, Any]) -> tuple[str, str]:
    """Both are texts; InputError otherwise."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError("a message has no role or no content")
    return role, content
