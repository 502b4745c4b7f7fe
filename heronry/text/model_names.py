"""What the name of a model's file or folder says about its conversations: {arch}-{data}-{size}-{date}-ctx{N}.pth, as in
rwkv7-g1k-7.2b-20260930-ctx25600.pth."""

from __future__ import annotations

import re
from typing import NamedTuple

from .templates import TEMPLATES

NAMED_AFTER = {  # words in the names of the files that models are published in
    "raven": "raven",
    r"g[1-9][a-z]?\d*": "g1",
    r"world\d*|g0[a-z]?\d*": "world",
}
# The letter behind g1 says in which data a model saw tools. A list of them in JSON, the official form, is all others'.
TOOL_STYLES = {"g": "function_calling", "h": "xml", "k": "g1k"}
CHINESE_SINCE = 20250921  # the date from which on models begin a Chinese thought with another word


class ChatDefaults(NamedTuple):
    """How a model was shown conversations.

    template: its name; None if the name of the file does not say it (see `usual_template`).
    tool_style: one of heronry.text.tool_styles; None = that of the template.
    think: one of heronry.text.thinking; None = as the template has it. No model thinks without being asked to.
    chinese_think: the mode in which it thinks in Chinese.
    """

    template: str | None
    tool_style: str | None
    think: str | None
    chinese_think: str


def chat_defaults(file_name: str) -> ChatDefaults:
    """How the model in a file or folder of this name was shown conversations, tools and thoughts."""
    template = template_by_name(file_name)
    letter = _find(r"g[1-9]([a-z]?)\d*", file_name)
    style = TOOL_STYLES.get(letter or "") if template == "g1" else None
    if template is not None and style is None:
        style = TEMPLATES[template].tool_style
    date = _find(r"(20\d{6})", file_name)
    is_early = date is not None and int(date) <= CHINESE_SINCE
    return ChatDefaults(template, style, None, "chinese-early" if is_early else "chinese")


def template_by_name(file_name: str) -> str | None:
    """The name of the template that a model was trained with, told by the name of its file or folder, as in
    rwkv7-g1a-0.1b; None if that says nothing."""
    return next((template for words, template in NAMED_AFTER.items() if _find(f"({words})", file_name)), None)


def usual_template(generation: str, world: bool) -> str:
    """The name of the template that models of a generation usually were trained with. world: with that vocabulary."""
    if generation == "rwkv4" and not world:
        return "raven"
    return "g1" if generation == "rwkv7" and world else "world"


def trained_context(file_name: str) -> int | None:
    """The number of tokens that a model was trained on at once, told by the name of its file; None if that does not say
    it. No limit: a longer text only was never seen in training."""
    length = _find(r"ctx(\d{1,9})", file_name)
    return int(length) if length else None


def _find(word: str, file_name: str) -> str | None:
    """The group of a pattern of a whole word in a name, in lower case; None if the name has no such word."""
    found = re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", file_name.lower())
    return found and found[1]
