"""Notes: what a config.json says besides the sizes of the model, for LLM and for pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, show

NOTES = ("chat_template", "opening_tokens", "labels")


def select_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The notes in the config of a checkpoint."""
    return {key: config[key] for key in NOTES if key in config}


def read_notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The notes in the metadata of a safetensors file, where they are JSON; InputError if they are something else."""
    try:
        notes = json.loads(metadata.get("notes", "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"the notes in its metadata are not JSON ({error})") from error
    if not isinstance(notes, dict):
        raise InputError(f"the notes in its metadata must be a JSON object, got {show(notes)}")
    for key, value in notes.items():
        check_note(key, value)
    return notes


def check_note(key: str, value: Any) -> None:
    """InputError if the value of a note has the wrong type."""
    if key == "chat_template" and not isinstance(value, str):
        raise InputError(f"the note {key} is {show(value)}; expected the name of a template")
    if key == "labels" and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
        raise InputError(f"the note {key} is {show(value)}; expected a list of names")
    if key == "opening_tokens" and not (isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)):
        raise InputError(f"the note {key} is {show(value)}; expected a list of token ids")
