"""What `heronry convert`, `quantize` and `merge` have in common: another copy of a model beside the original."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checkpoint import check_folder_name, locate, select_notes
from ..errors import InputError
from ..files import read_json
from ..models import Model, Network
from ..text.jinja_templates import JinjaTemplate
from ..text.template_choice import model_template
from ..text.tokenizers import guess_tokenizer
from .options import check_target


def locate_source_and_target(source: str, target: Path, force: bool, kind: str = "folder") -> tuple[Path, Path]:
    """The local paths of the original and of its copy. kind: what the copy is.

    Raises:
        InputError: they are the same, or the copy exists (see `check_target`).
    """
    original, target = locate(source), target.expanduser()
    if kind == "folder":
        check_folder_name(target)
    if target.exists() and original.exists() and target.samefile(original):
        raise InputError(f"{target}: is the original itself; choose another {kind}")
    return original, check_target(target, force)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Where to write instead of `target`: beside it if it is a folder with something in it, which is only replaced at
    the end of the block; else `target` itself."""
    if not (target.is_dir() and any(target.iterdir())):
        yield target
        return
    new, old = (target.with_name(f".{target.name}-{which}") for which in ("new", "old"))
    for left in (new, old):  # by a crash; the target is whole
        if left.exists():
            shutil.rmtree(left)
    yield new
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def companions(source: Path, model: Network) -> tuple[Path | None, dict[str, Any]]:
    """What a copy of the model in `source` needs besides weights: the file of its tokenizer, if it has one, and the
    notes of its config.json (chat template, opening tokens, labels)."""
    tokenizer: str | Path | None = None
    if isinstance(model, Model):
        with suppress(InputError):  # unknown for the original too, where --tokenizer names it
            tokenizer = guess_tokenizer(model.config.vocab_size, source if source.is_dir() else source.parent)
    config = read_json(source / "config.json") if source.is_dir() else {}
    config |= config.get("heronry") or {}  # a config.json of Hugging Face keeps the notes under this key
    notes = select_notes(config)
    template = model_template(source, notes)
    if template is not None:
        notes["chat_template"] = template.text if isinstance(template, JinjaTemplate) else template
    return tokenizer if isinstance(tokenizer, Path) else None, notes
