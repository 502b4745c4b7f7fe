"""What `heronry quantize` and `heronry merge` have in common: a changed copy of a model beside the original."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint import check_folder_name, locate, select_notes
from ..errors import InputError
from ..models import Model, Network
from ..text.tokenizers import guess_tokenizer


def locate_source_and_target(source: Path, target: Path) -> tuple[Path, Path]:
    """The local paths of the original and of the folder of its copy; InputError if they are the same."""
    source, target = locate(source), target.expanduser()
    check_folder_name(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is the original itself; choose another folder")
    return source, target


def companions(source: Path, model: Network) -> tuple[Path | None, dict[str, Any]]:
    """What a copy of the model in `source` needs besides weights: the file of its tokenizer, if it has one, and the
    notes of its config.json (chat template, opening tokens, labels)."""
    tokenizer: str | Path | None = None
    if isinstance(model, Model):
        with suppress(InputError):  # unknown for the original too, where --tokenizer names it
            tokenizer = guess_tokenizer(model.config.vocab_size, source if source.is_dir() else source.parent)
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) if source.is_dir() else {}
    config |= config.get("heronry") or {}  # a config.json of Hugging Face keeps the notes under this key
    return tokenizer if isinstance(tokenizer, Path) else None, select_notes(config)
