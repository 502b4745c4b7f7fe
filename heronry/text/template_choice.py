"""Which chat template a name, a text, a file or a model's folder means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, show, unknown_name
from ..files import read_json
from .jinja_templates import JinjaTemplate, to_jinja
from .model_names import template_by_name
from .templates import TEMPLATES, Template, parse_template, template_from

AnyTemplate = Template | JinjaTemplate
MOST_BYTES = 1 << 20  # of a file with a template; the longest that are published have 20 KB
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
ENDINGS = (".jinja", ".jinja2", ".j2")


def find_template(text: str | AnyTemplate) -> AnyTemplate:
    """The template that a text means.

    Args:
        text: a name in TEMPLATES; the name of a .jinja file; a template in Jinja; or a turn with {user} in it, see
            `parse_template`.

    Raises:
        InputError: it is none of these, or the file cannot be read.
    """
    if isinstance(text, Template | JinjaTemplate):
        return text
    if not isinstance(text, str):
        raise InputError(f"template must be a Template or the name of one, got {show(text)}")
    if text in TEMPLATES:
        return TEMPLATES[text]
    if is_jinja(text):
        return JinjaTemplate(text)
    if "{user}" in text:
        return parse_template(text)
    if text.endswith(ENDINGS):
        path = Path(text).expanduser()
        return JinjaTemplate(_read(path), str(path))
    raise unknown_name("chat template", text, TEMPLATES)


def template_text(text: str) -> str:
    """The same template as a text that `find_template` takes, without the file that it may be in: what notes and token
    files keep.

    Raises:
        InputError: as `find_template`; or a template in Jinja is damaged.
    """
    template = find_template(text)
    if not isinstance(template, JinjaTemplate):
        return text
    _ = template.separator  # shows a conversation
    return template.text


def in_jinja(template: AnyTemplate) -> str:
    """A template as a chat_template.jinja has it."""
    return template.source if isinstance(template, JinjaTemplate) else to_jinja(template)


def is_jinja(text: str) -> bool:
    """Whether a text is a template in Jinja, rather than a name."""
    return "{%" in text or "{{" in text


def restore_template(fields: Mapping[str, Any]) -> AnyTemplate:
    """Undoes what `dataclasses.asdict` and JSON do to a template: tuples became lists, and token ids text."""
    if "source" in fields:
        return JinjaTemplate(**{**fields, "stop_strings": tuple(fields["stop_strings"])})
    return template_from({**fields})


def describe_template(template: str | AnyTemplate) -> str:
    """A template in a few words: its name in TEMPLATES, or where it is from."""
    found = find_template(template)
    if isinstance(found, JinjaTemplate):
        return f"Jinja ({found.name})"
    return next((name for name, x in TEMPLATES.items() if x == found), "of its own")


def model_template(path: Path, notes: Mapping[str, Any], stored: str | None = None) -> str | JinjaTemplate | None:
    """The chat template of a model: its own in Jinja, else that of its notes, else the one that its name means; None if
    nothing says it (see `usual_template`).

    path: its file or folder.
    notes: what its config.json says, see heronry.save.
    stored: the text of a template inside the file.

    Raises:
        InputError: the folder's template cannot be read.
    """
    note = notes.get("chat_template")
    own = JinjaTemplate(stored, str(path)) if stored is not None and is_jinja(stored) else read_folder(path)
    if own is not None:
        names = [note, *TEMPLATES] if note in TEMPLATES else TEMPLATES
        return next((name for name in names if to_jinja(TEMPLATES[name]) == own.source), own)
    if note is not None:
        return str(note)
    return template_by_name(published_name(path))


def published_name(path: Path) -> str:
    """The name under which a model was published: of its file or folder, in the cache of huggingface_hub of the
    repository."""
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name


def read_folder(folder: Path) -> JinjaTemplate | None:
    """The template in Jinja of a folder in Hugging Face's layout: chat_template.jinja, or else chat_template in
    tokenizer_config.json; None if it has none.

    Raises:
        InputError: one of these files, or generation_config.json, cannot be read.
    """
    file = folder / "chat_template.jinja"
    settings = _read_settings(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((x["template"] for x in source if isinstance(x, dict) and x.get("name") == "default"), None)
    if file.is_file():
        source = _read(file)
    if source is None:
        return None
    where = str(file if file.is_file() else folder / "tokenizer_config.json")
    if not isinstance(source, str):
        raise InputError(f"{where}: chat_template must be a text, got {show(source)}")
    stops = _read_settings(folder / "generation_config.json").get("stop_strings") or ()
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise InputError(f"{folder / 'generation_config.json'}: stop_strings must be texts, got {show(stops)}")
    tokens = {name: x.get("content") if isinstance(x := settings.get(name), dict) else x for name in TOKENS}
    return JinjaTemplate(source, where, tuple(stops), {name: x for name, x in tokens.items() if isinstance(x, str)})


def _read_settings(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    try:
        return read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(f"{file.parent}: {error}") from error


def _read(path: Path) -> str:
    """The text of a template."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: too large for a chat template")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
