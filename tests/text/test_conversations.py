"""Conversations to learn from: what the loss counts is what a chat must write by itself."""

from __future__ import annotations

from functools import partial

import pytest

from heronry import InputError
from heronry.text.chat_templates import TEMPLATES
from heronry.text.conversations import encode_conversation, render_conversation
from heronry.text.tokenizers import load_tokenizer

TALK = [
    {"role": "user", "content": "Hi,\n\nwho are you?"},
    {"role": "assistant", "content": "A rook.\n\nAnd you?"},
    {"role": "user", "content": "A crow."},
    {"role": "assistant", "content": "Hello, crow!"},
]


@pytest.mark.parametrize("name", ["raven", "world", "g1", "story", "g1-fast-think"])
def test_pieces_as_a_template_shows_them(name):
    """What the loss counts is what a chat must be answered with, up to where it stops listening."""
    template = TEMPLATES[name]
    for marked in (True, False):
        pieces = render_conversation([{"role": "system", "content": "Be a bird. "}, *TALK], template, marked)
        text = "".join(piece for piece, _ in pieces)
        counted = "".join(piece[:n] + "|" * (n > 0) for piece, n in pieces).split("|")
        first = "A rook.\nAnd you?" if name == "raven" else "A rook.\n\nAnd you?"
        begins = {"raven": "Bob: Hi,\nwho are you?\n\nAlice:", "story": "User: Hi,\n\nwho are you?\n\nAssistant:"}
        begin = begins.get(name, "User: Hi,\nwho are you?\n\nAssistant:")
        think, answer = (" <think>\n</think", ">\n") if name == "g1-fast-think" else ("", " ")
        opening = "System: Be a bird.\n\n" if name.startswith("g1") else "Be a bird.\n\n"
        assert text.startswith(f"{opening}{begin}{think}{answer}{first}\n\n")
        stop = template.stops[0]
        assert "".join(counted[:-2]) == f"{answer}{first}{stop}"
        assert counted[-2] == f"{answer}Hello, crow!{'' if marked else stop}"


def test_thinking_and_bad_conversations():
    think = partial(render_conversation, template=TEMPLATES["g1-think"], has_end_of_text=True)
    talk = [TALK[0], {"role": "assistant", "content": "<think>Hm.</think>Me."}]
    assert think(talk)[1] == (">Hm.</think>Me.", 15)
    for messages, said in [
        (TALK[:2], "an answer does not begin with '<think'"),
        ([TALK[0]], "do not alternate between user and assistant"),
        (TALK[1:], "do not alternate between user and assistant"),
        ([TALK[0], TALK[0]], "do not alternate between user and assistant"),
        ([TALK[0], {"role": "assistant"}], "a message has no role or no content"),
        ([TALK[0], {"role": "assistant", "content": " \n"}], "an answer is empty"),
        ([{"role": "user", "content": ""}, TALK[1]], "the message is empty"),
    ]:
        with pytest.raises(InputError, match=said):
            think(messages)
    skips = partial(render_conversation, template=TEMPLATES["g1-fast-think"], has_end_of_text=True)
    assert skips(TALK[:2])[1].text.startswith(">\n")
    with pytest.raises(InputError, match=r"an answer does not begin with '<think>\\n</think'"):
        skips(talk)  # it would have two thoughts, the first of them empty
    world = partial(render_conversation, template=TEMPLATES["world"], has_end_of_text=True)
    assert world(TALK[:3]) == world(TALK[:2])  # what nobody answered teaches nothing


@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
def test_ids_and_mask(tokenizer):
    """The ids are those of the text; the mask is on the answers, the stop text and the end of text."""
    known = load_tokenizer(tokenizer)
    ids, mask = encode_conversation(TALK[2:], TEMPLATES["world"], known)
    counted = [i for i, counts in zip(ids, mask, strict=True) if counts]
    if tokenizer == "world":
        assert (ids[-1], counted[-1]) == (0, 0)
        ids, counted = ids[:-1], counted[:-1]
    stop = "" if tokenizer == "world" else "\n\nUser:"
    assert known.decode(ids) == f"User: A crow.\n\nAssistant: Hello, crow!{stop}"
    assert known.decode(counted) == f" Hello, crow!{stop}"
