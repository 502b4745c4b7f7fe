"""Modes of thinking: what an answer begins with, so that the model thinks first, and how long, or does not think.

- the model closes "<think" and "</think" itself: World's tokens join ">" with what follows it
- a hint of the length stands behind the question, after one space
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import unknown_name


class Thinking(NamedTuple):
    """opening: of the answer. hint: at the end of the last message of the user."""

    opening: str
    hint: str = ""


THINKING = {
    "none": Thinking(""),  # G1k thinks even then, which only an empty thought prevents
    "open": Thinking("<think"),
    "short": Thinking("<think", " (think a bit)"),
    "medium": Thinking("<think", " (think)"),
    "long": Thinking("<think", " (think a lot)"),
    "fake": Thinking("<think>\n</think"),
    "fake-compact": Thinking("<think></think"),
    "chinese": Thinking("<think>好的"),  # if the question is in Chinese
    "chinese-early": Thinking("<think>嗯"),  # the same for models from before 2025-09-22
}
EFFORTS = {  # OpenAI's reasoning_effort
    "none": "fake",
    "minimal": "short",
    "low": "short",
    "medium": "medium",
    "high": "long",
    "xhigh": "long",
    "max": "long",
}


def thinking_by_name(name: str, question: str) -> Thinking:
    """A mode by its name. question: the last message of the user.

    Raises:
        InputError: there is no such mode.
    """
    if not isinstance(name, str) or name not in THINKING:
        raise unknown_name("mode of thinking", name, THINKING, param="think")
    if name.startswith("chinese") and not re.search("[\u3400-\u9fff]", question):
        return THINKING["open"]
    return THINKING[name]
