"""Notes: what a config.json says besides the sizes of the model, for LLM and for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

NOTES = ("chat_template", "opening_tokens", "labels")


def select_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The notes in the config of a checkpoint."""
    return {key: config[key] for key in NOTES if key in config}


def check_note(key: str, value: Any) -> None:
    """InputError if the value of a note has the wrong type."""
    if key == "chat_template" and not isinstance(value, str):
        raise InputError(f"config.json says {key} = {value!r}; expected the name of a template")
    if key == "labels" and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
        raise InputError(f"config.json says {key} = {value!r}; expected a list of names")
    if key == "opening_tokens" and not (isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)):
        raise InputError(f"config.json says {key} = {value!r}; expected a list of token ids")
