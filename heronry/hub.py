"""Files on the Hugging Face hub, by name: hf://OWNER/REPOSITORY/FILE, hf://OWNER/REPOSITORY or OWNER/REPOSITORY, or by
their address on huggingface.co.

huggingface_hub downloads them once and uses its own cache, tokens and HF_HUB_OFFLINE. @REVISION may follow REPOSITORY.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

from .errors import InputError

TEXTS = ["*.json", "*.txt", "*.jinja"]  # downloaded of a whole repository, besides its weights
SINGLE_FILES = (".pth", ".gguf", ".st", ".safetensors", ".bin")  # that hold a whole model
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
# OWNER, REPOSITORY, REVISION, FILE
ADDRESS = re.compile(r"(?:hf:/{1,2})?([\w.-]+)/([\w.-]+)(?:@([^/]+))?(?:/(.+))?")
WEB_ADDRESS = re.compile(
    r"https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+)/([\w.-]+)"
    r"(?:/(?:blob|resolve|raw|tree)/([^/?#]+)(?:/([^?#]+))?)?/?(?:[?#].*)?"
)
PATIENCE = 3.0  # seconds for the hub to answer at all; huggingface_hub tries for half a minute
MOST_NAMES = 8  # in a message
NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def is_name(path: str | Path) -> bool:
    """Whether this is a name on the hub: with hf://, a web address, or OWNER/REPOSITORY where no such local path
    exists."""
    text = _with_slashes(path)
    if text.startswith(("hf:/", "http:/", "https:/")):
        return True
    return bool(NAME.fullmatch(text)) and not os.path.exists(path) and not os.path.isdir(text.split("/")[0])


def fetch(path: str | Path, **options: Any) -> Path:
    """Downloads a file or a repository, unless it is in the cache, and returns its local path.

    Args:
        path: hf://OWNER/REPOSITORY/FILE, hf://OWNER/REPOSITORY or OWNER/REPOSITORY, or their addresses on
            huggingface.co. The ending .pth of a file may be missing.
        options: for huggingface_hub: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        InputError: the repository or file does not exist, the hub refuses it or cannot be reached, or the cache cannot
            be written.
    """
    repository, revision, file = _parse(path)
    revision = options.get("revision") or revision
    if revision:
        options = {**options, "revision": revision}
    outage = "downloading is off (local_files_only)" if options.get("local_files_only") else _outage(repository)
    if outage:
        options = {**options, "local_files_only": True, "force_download": False}
    try:
        with _without_warnings():
            if file:
                return _download_file(repository, file, options)
            folder = _download_repository(repository, options)
            if any(folder.rglob("config.json")):
                return folder
            files = _list_files(repository, folder, options)
    except Exception as error:  # the HTTP library, and with it its errors, depends on the version of huggingface_hub
        raise InputError(f"{path}: {_explain(error, path, repository, revision, file, outage)}") from error
    choices = sorted(f"hf://{repository}/{name}" for name in files if name.endswith(SINGLE_FILES))
    if not choices:
        raise InputError(f"{path}: {repository} holds no model")
    more = f" and {len(choices) - MOST_NAMES} more" if len(choices) > MOST_NAMES else ""
    raise InputError(f"{path}: holds single files, choose one: {', '.join(choices[:MOST_NAMES])}{more}")


def _with_slashes(path: str | Path) -> str:
    """The text of a name, also where Windows has written it with backslashes."""
    return str(path).replace("\\", "/")


def _parse(path: str | Path) -> tuple[str, str | None, str | None]:
    """OWNER/REPOSITORY, the revision and the file that a name on the hub means."""
    text = _with_slashes(path)
    is_web = text.startswith(("http:/", "https:/"))
    parts = (WEB_ADDRESS if is_web else ADDRESS).fullmatch(text)
    if not parts:
        raise InputError(f"{path}: give hf://OWNER/REPOSITORY or hf://OWNER/REPOSITORY/FILE")
    owner, name, revision, file = (unquote(part) if part and is_web else part for part in parts.groups())
    return f"{owner}/{name}", revision, file


def load_dataset(name: str, **options: Any) -> Any:
    """The split of a dataset, by the package `datasets`.

    Args:
        name: hf://NAME or hf://NAME:SPLIT, of a dataset of the hub or a local folder; without a split, train.
        options: for datasets.load_dataset.

    Raises:
        InputError: it is not in the cache, and the hub cannot be reached.
        Exception: of many kinds, if there is no such dataset or split, or its files are damaged.
    """
    import datasets
    from huggingface_hub import constants

    name, _, split = name.removeprefix("hf://").partition(":")
    outage = "" if os.path.exists(name) else _outage(name, "datasets")
    places: tuple[Any, ...] = (constants, datasets.config)
    offline = [place.HF_HUB_OFFLINE for place in places]
    try:
        if outage:  # else the packages would try for half a minute
            for place in places:
                place.HF_HUB_OFFLINE = True
        with _without_warnings():
            return datasets.load_dataset(name, split=split or "train", **options)
    except Exception as error:
        if outage:
            raise InputError(f"not in the hub's cache, and {outage}") from error
        raise
    finally:
        for place, value in zip(places, offline, strict=True):
            place.HF_HUB_OFFLINE = value


def _outage(repository: str, kind: str = "models") -> str:
    """Why the hub cannot be used now, found within PATIENCE seconds; "" if it can. kind: or "datasets"."""
    # imported here because it is slow to import and most paths are local
    from huggingface_hub import constants, get_session

    statuses: list[int] = []

    def ask() -> None:
        with suppress(Exception):
            address = f"{constants.ENDPOINT}/api/{kind}/{repository}"
            statuses.append(get_session().head(address, timeout=PATIENCE).status_code)

    thread = Thread(target=ask, daemon=True)  # looking up the name of a host has no timeout of its own
    thread.start()
    thread.join(PATIENCE)
    if not statuses:
        return "the hub cannot be reached (offline, or no network)"
    return _status_text(statuses[0]) if statuses[0] >= 500 else ""


def _status_text(status: int) -> str:
    hint = "; log in with `hf auth login`" if status in (401, 403) else ""
    return f"the hub answers with error {status}{hint or '; try again later'}"


@contextmanager
def without_repetition() -> Iterator[None]:
    """Within the block, in which a streamed dataset is read, a request that fails is repeated for half a minute, as
    huggingface_hub does. `datasets` would do all of that 20 times."""
    from datasets import config

    before = {
        name: value for name, value in vars(config).items() if re.fullmatch("STREAMING_.*(RETRIES|INTERVAL)", name)
    }
    try:
        vars(config).update({name: int(name.endswith("RETRIES")) for name in before})
        with _without_warnings():
            yield
    finally:
        vars(config).update(before)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within the block no attempt that failed is logged: the end is either good or one line of ours."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("huggingface_hub", "datasets"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _download_file(repository: str, file: str, options: dict[str, Any]) -> Path:
    """One file; where there is none of this name, the one with .pth at its end."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, **options))
    except EntryNotFoundError:
        if not file.endswith((*SINGLE_FILES, ".json")):
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(repository, f"{file}.pth", **options))
        raise


def _download_repository(repository: str, options: dict[str, Any]) -> Path:
    """A repository without pickles beside safetensors and without other frameworks' weights."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, allow_patterns=[*TEXTS, "model*.safetensors"], **options))
    if not any(folder.rglob("model*.safetensors")):
        folder = Path(snapshot_download(repository, allow_patterns=[*TEXTS, "pytorch_model*.bin"], **options))
    return folder


def _list_files(repository: str, folder: Path, options: dict[str, Any]) -> list[str]:
    """The names of the files in a repository; without a network those in its folder in the cache."""
    if options.get("local_files_only"):
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    from huggingface_hub import HfApi

    return HfApi(token=options.get("token")).list_repo_files(repository, revision=options.get("revision"))


def _explain(
    error: BaseException | None, path: str | Path, repository: str, revision: str | None, file: str | None, outage: str
) -> str:
    """What went wrong, from an error of huggingface_hub and those it was raised from. outage: see `_outage`."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    first = str(error).strip().partition("\n")[0]
    while error is not None:
        if isinstance(error, GatedRepoError):
            return f"{repository} needs the permission of its owner; log in with `hf auth login`"
        if isinstance(error, RepositoryNotFoundError):
            return f"no such local file or folder, and no repository {repository} on the hub"
        if isinstance(error, RevisionNotFoundError):
            return f"{repository} has no revision {revision}"
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return f"{repository} has no file {file}"
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None:
            return _status_text(response.status_code)
        is_network = isinstance(error, ConnectionError | TimeoutError | socket.gaierror)
        if isinstance(error, OSError) and error.errno and not is_network and error.errno not in NO_ROUTE:
            return f"cannot be written to {error.filename or 'the cache of the hub'} ({os.strerror(error.errno)})"
        error = error.__cause__ or error.__context__
    if outage:
        here = "" if _with_slashes(path).startswith(("hf:/", "http")) else "no such local file or folder; "
        return f"{here}not in the hub's cache, and {outage}"
    return f"the download failed ({first})"


def push(folder: Path, repository: str) -> None:
    """Uploads a folder to a repository on the hub, which is created if it does not exist.

    Raises:
        InputError: no permission, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"{repository}: the hub refused it ({str(error).splitlines()[0]})") from error
