"""Conversations as training data: messages become token ids and a mask of the tokens that count in the loss.

- a conversation is encoded in the same pieces as by engine/chat.py: a turn is a message with the beginning of its
  answer, as the template shows them; an answer is the rest of the answer with the separator behind it
- the loss counts what the model has to write by itself: the answers, and behind each of them the whole stop text. The
  stop text of world and g1, "\\n\\nUser:", reaches into the next turn
- the last answer is followed by the end of text, or by the stop text if the tokenizer has no such id
- a template in Jinja shows the whole conversation; where its answers are is told from that
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError
from .jinja_templates import JinjaTemplate
from .templates import Template
from .tokenizers import Tokenizer


class Piece(NamedTuple):
    """A text that is encoded by itself. Its first `n_counted` characters count in the loss."""

    text: str
    n_counted: int


def encode_conversation(
    messages: Sequence[Mapping[str, Any]], template: Template | JinjaTemplate, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Encodes a conversation for training.

        from heronry.text.chat_templates import TEMPLATES
        from heronry.text.tokenizers import load_tokenizer

        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        ids, mask = encode_conversation(messages, TEMPLATES["world"], load_tokenizer("world"))

    Args:
        messages: {"role", "content"} of an optional system text, then of user and assistant in turn. A last message
            without an answer is left out. An answer with "weight": 0 is read, but does not count in the loss. A message
            of the user may have an "input": what it is about.
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
    messages: Sequence[Mapping[str, Any]], template: Template | JinjaTemplate, has_end_of_text: bool
) -> list[Piece]:
    """The pieces of a conversation, without the end of text. Arguments and errors as for `encode_conversation`.

    has_end_of_text: whether an end of text will follow; otherwise the stop text is appended.
    """
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError("a message has no role or no content")
    has_system = bool(messages) and messages[0]["role"] == "system"
    system, turns = messages[:has_system], messages[has_system:]
    if len(turns) < 2 or any(x["role"] != ("user", "assistant")[i % 2] for i, x in enumerate(turns)):
        raise InputError("the messages do not alternate between user and assistant")
    turns = turns[: len(turns) // 2 * 2]
    for i, message in enumerate(turns):
        if i % 2 and not message["content"].strip():
            raise InputError("an answer is empty")
    if isinstance(template, JinjaTemplate):
        return _render_jinja(system, turns, template, has_end_of_text)
    pieces = [Piece(template.render_history(system), 0)] if system else []
    stop, separator = template.stops[0], template.separator
    for i, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        turn = template.ask(question)
        # the part of the stop text that is the beginning of this turn
        learned = i > 0 and turns[2 * i - 1].get("weight") != 0 and (separator + turn).startswith(stop)
        pieces.append(Piece(turn, max(0, len(stop) - len(separator)) if learned else 0))
        opening, text = template.begin_answer(answer["content"])
        if opening != template.opening:
            raise InputError(f"an answer does not begin with {template.opening.strip()!r}, as the template does")
        text += separator if 2 * i + 2 < len(turns) else "" if has_end_of_text else stop
        pieces.append(Piece(text, len(text) if answer.get("weight") != 0 else 0))
    return pieces


def _render_jinja(
    system: Sequence[Mapping[str, Any]],
    turns: Sequence[Mapping[str, Any]],
    template: JinjaTemplate,
    has_end_of_text: bool,
) -> list[Piece]:
    for message in (*system, *turns[::2]):
        template.clean(message["content"])
    shown = [{key: x for key, x in message.items() if key != "weight"} for message in (*system, *turns)]
    text, answers = template.find_answers(shown)
    stop = next(iter(template.stops), "")
    if has_end_of_text:
        text = text.rstrip()
    elif stop.startswith(template.separator):
        text = text.removesuffix(template.separator) + stop
    pieces: list[Piece] = []
    end, n_learned = 0, 0  # of the pieces so far, and how much of what follows is learned still
    for (answer_begin, answer_end), message, is_last in zip(
        answers, turns[1::2], [False] * (len(answers) - 1) + [True], strict=True
    ):
        pieces.append(Piece(text[end:answer_begin], n_learned))
        end = len(text) if is_last else answer_end
        counts = message.get("weight") != 0
        pieces.append(Piece(text[answer_begin:end], end - answer_begin if counts else 0))
        said = answer_begin + len(text[answer_begin:answer_end].removesuffix(template.separator).rstrip())
        n_learned = max(0, said + len(stop) - end) if counts and text.startswith(stop, said) else 0
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
