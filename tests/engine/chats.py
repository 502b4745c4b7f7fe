"""What the tests of conversations share."""

from __future__ import annotations

import torch

from heronry.engine.chat import Chat
from heronry.engine.llm import LLM
from heronry.models import State
from heronry.text.chat_templates import TEMPLATES


def assert_same(a: State, b: State, tolerance: float = 1e-8) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        for left, right in zip(x, y, strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def last(chat: Chat):
    return chat._tree.heads[chat.branch]


def talk(scripted, *replies, template="story", system=None, **options):
    """A chat with the scripted model: (chat, model, last turn's owed text after each reply)."""
    cue = (TEMPLATES[template] if isinstance(template, str) else template).turn.rsplit("\n", 1)[1]
    model, tokenizer = scripted(*replies, cue=cue)
    return LLM(model, tokenizer=tokenizer).chat(template=template, system=system), model
