"""Adapters that clients may load while the server runs: those in one folder, that it was started with."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, show
from .errors import ApiError
from .models import ModelTable, ServedModel

MOST_LOADED = 64


@dataclass(frozen=True)
class LoadedAdapter:
    """version: SHA-256 of its files. path: as it was asked for."""

    name: str
    version: str
    path: str


class AdapterFolder:
    """Each adapter is a model of the server, by the name that a client gave it: the first model with the adapter. Those
    that the server was started with cannot be replaced or removed. May be used from any thread."""

    def __init__(self, models: ModelTable, folder: Path | None = None):
        """folder: None = no client may load anything."""
        self._models = models
        self._folder = None if folder is None else folder.expanduser().resolve()
        self._lock = threading.Lock()  # held while one is loaded or removed
        self.loaded: dict[str, LoadedAdapter] = {}

    def load(self, name: str, path: str) -> LoadedAdapter:
        """Reads an adapter, in place of one that was loaded under its name; ApiError or InputError for one that cannot
        be."""
        file = self._locate(path)
        if not re.fullmatch(r"[\w.:@-]{1,128}", name, re.ASCII):
            raise InputError(f"{show(name)} cannot be the name of an adapter: use letters, digits and any of _ . : @ -")
        with self._lock:
            if name in self._models.by_name and name not in self.loaded:
                raise ApiError(400, f"there is a model {name!r} already")
            if name not in self.loaded and len(self.loaded) >= MOST_LOADED:
                raise ApiError(400, f"{MOST_LOADED} adapters are loaded already; remove one first")
            adapter = LoadedAdapter(name, _digest(file), path)
            if name in self.loaded and self.loaded[name].version == adapter.version:
                return self.loaded[name]
            base = self._models.find(None)
            try:
                speaker = base.llm.adapters.add(name, file)
            except InputError as error:
                raise InputError(str(error).replace(str(file), path)) from None
            self._models.add(ServedModel(name, base.llm, speaker, f"{base.path} + {path}", base.context))
            self.loaded[name] = adapter
            return adapter

    def remove(self, name: str, version: str | None = None) -> bool:
        """Forgets one; what is being written with it goes on. False if it is not loaded, or of another version."""
        with self._lock:
            if name not in self.loaded or version not in (None, self.loaded[name].version):
                return False
            self._models.find(name).llm.adapters.remove(name)
            self._models.remove(name)
            del self.loaded[name]
            return True

    def find(self, model: ServedModel, name: str, version: str | None) -> ServedModel:
        """A model with one of its adapters; ApiError where there is none of that name and version."""
        if name not in model.llm.adapters:
            raise ApiError(404, f"there is no adapter {name!r} of {model.name!r} here", "adapter_id")
        if version is not None and (name not in self.loaded or self.loaded[name].version != version):
            raise ApiError(404, f"the adapter {name!r} is here in another version", "adapter_version")
        return self._models.find(name)

    def _locate(self, path: str) -> Path:
        """Where it is, links followed. What is outside of the folder is refused, whether it is there or not."""
        if self._folder is None:
            raise ApiError(403, "adapters are loaded from a folder that the server is started with: --adapter-folder")
        try:
            file = (self._folder / path).resolve()
            is_inside = file.is_relative_to(self._folder) and file != self._folder
            is_there = is_inside and file.exists()
        except (OSError, ValueError, RuntimeError):  # as of a name that is too long, or a loop of links
            is_inside = False
        if not is_inside:
            raise ApiError(403, "adapters are loaded only from inside of the server's adapter folder")
        if not is_there:
            raise ApiError(404, f"there is no {show(path)} in the server's adapter folder")
        return file


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    whole = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            whole.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()
