"""What Tab completes in a shell besides commands and options."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from glob import escape, glob
from os.path import isdir

from .. import catalog
from ..errors import InputError


def model(incomplete: str) -> list[str]:
    """The models that are here by short name, and files."""
    return _beginning(["bundled", *_downloaded()], incomplete) + _files(incomplete)


def downloaded(incomplete: str) -> list[str]:
    """Short names of models in the default folder."""
    return _beginning(_downloaded(), incomplete)


def published(incomplete: str) -> list[str]:
    """Short names of models on the hub."""
    return _beginning(catalog.published(), incomplete)


def template(incomplete: str) -> list[str]:
    """Names of chat templates."""
    from ..text.chat_templates import TEMPLATES

    return _beginning(TEMPLATES, incomplete)


def preset(incomplete: str) -> list[str]:
    """Names of presets of sampling."""
    from ..engine.presets import PRESETS

    return _beginning(PRESETS, incomplete)


def setting(incomplete: str) -> list[str]:
    """Settings of `heronry train`, and files."""
    from ..train.config import setting_names

    return _beginning([f"{name}=" for name in setting_names()], incomplete) + _files(incomplete)


def _downloaded() -> Iterable[str]:
    with suppress(InputError, OSError):
        return catalog.downloaded()
    return ()


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _files(incomplete: str) -> list[str]:
    return [f"{path}/" if isdir(path) else path for path in sorted(glob(escape(incomplete) + "*"))]
