"""Files on the Hugging Face hub, by name: hf://OWNER/REPOSITORY/FILE, hf://OWNER/REPOSITORY or OWNER/REPOSITORY.

huggingface_hub downloads them once and uses its own cache, tokens and HF_HUB_OFFLINE. @REVISION may follow REPOSITORY.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .errors import InputError

# downloaded of a whole repository, besides its weights
TEXTS = ["*.json", "*.txt", "*.jinja"]
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def is_name(path: str | Path) -> bool:
    """Whether this is a name on the hub: with hf://, or OWNER/REPOSITORY where no such local path exists."""
    text = str(path)
    if text.startswith("hf:/"):
        return True
    return bool(NAME.fullmatch(text)) and not os.path.exists(text) and not os.path.isdir(text.split("/")[0])


def fetch(path: str | Path, **options: Any) -> Path:
    """Downloads a file or a repository, unless it is in the cache, and returns its local path.

    Args:
        path: hf://OWNER/REPOSITORY/FILE, hf://OWNER/REPOSITORY or OWNER/REPOSITORY.
        options: for huggingface_hub: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        InputError: the repository or file does not exist, or the hub cannot be reached.
    """
    parts = re.fullmatch(r"(?:hf:/{1,2})?([\w.-]+)/([\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", str(path))
    if not parts:
        raise InputError(f"{path}: give hf://OWNER/REPOSITORY or hf://OWNER/REPOSITORY/FILE")
    owner, name, revision, file = parts.groups()
    if revision:
        options = {"revision": revision, **options}
    # imported here because it is slow to import and most paths are local
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = f"{owner}/{name}"
    try:
        if file:
            return Path(hf_hub_download(repository, file, **options))
        return _download_repository(snapshot_download, repository, options)
    except GatedRepoError as error:
        raise InputError(
            f"{path}: {repository} needs the permission of its owner; log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{path}: no such local file or folder, and no repository {repository} on the hub") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{path}: {repository} has no revision {options.get('revision')}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(f"{path}: {repository} has no file {file}") from error
        here = "" if str(path).startswith("hf:/") else "no such local file or folder; as a name on the hub: "
        raise InputError(
            f"{path}: {here}not in the hub's cache, and the hub cannot be reached (offline, or no network)"
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _download_repository(download: Any, repository: str, options: dict[str, Any]) -> Path:
    """A repository without pickles beside safetensors and without other frameworks' weights."""
    folder = Path(download(repository, allow_patterns=[*TEXTS, "*.safetensors"], **options))
    if not any(folder.glob("*.safetensors")):
        folder = Path(download(repository, allow_patterns=[*TEXTS, "pytorch_model*.bin"], **options))
    return folder


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
