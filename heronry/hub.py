"""Files of the Hugging Face hub, by name: hf://OWNER/REPOSITORY/FILE, hf://OWNER/REPOSITORY or OWNER/REPOSITORY.

huggingface_hub fetches them, once: its cache, its tokens and HF_HUB_OFFLINE are respected. A REPOSITORY may be followed
by @REVISION.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .errors import InputError

# of a whole repository; the weights as safetensors where it has them
TEXTS = ["*.json", "*.txt", "*.jinja"]
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def is_name(path: str | Path) -> bool:
    """Whether this says something on the hub: with hf://, or as OWNER/REPOSITORY where no such folder is near."""
    text = str(path)
    if text.startswith("hf:/"):
        return True
    return bool(NAME.fullmatch(text)) and not os.path.exists(text) and not os.path.isdir(text.split("/")[0])


def fetch(path: str | Path, **options: Any) -> Path:
    """Where the file or the folder of the repository lies now.

    options: of huggingface_hub: revision, cache_dir, token, local_files_only, force_download.

    Raises:
        InputError: no such repository or file, or no way to it.
    """
    parts = re.fullmatch(r"(?:hf:/{1,2})?([\w.-]+)/([\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", str(path))
    if not parts:
        raise InputError(f"{path}: give hf://OWNER/REPOSITORY or hf://OWNER/REPOSITORY/FILE")
    owner, name, revision, file = parts.groups()
    if revision:
        options = {"revision": revision, **options}
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
        return _whole(snapshot_download, repository, options)
    except GatedRepoError as error:
        raise InputError(
            f"{path}: {repository} is only for those whom its owner lets in; log in with hf auth"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{path}: no such file or folder here, and no repository {repository} on the hub") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{path}: {repository} has no revision {options.get('revision')}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(f"{path}: {repository} has no file {file}") from error
        here = "" if str(path).startswith("hf:/") else "no such file or folder here; as a name of the hub: "
        raise InputError(
            f"{path}: {here}not in the cache of the hub, and the hub cannot be reached (offline, or no network)"
        ) from error
    except (EntryNotFoundError, HFValidationError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _whole(download: Any, repository: str, options: dict[str, Any]) -> Path:
    """A repository without what is of no use: pickles beside safetensors, other frameworks' weights."""
    folder = Path(download(repository, allow_patterns=[*TEXTS, "*.safetensors"], **options))
    if not any(folder.glob("*.safetensors")):
        folder = Path(download(repository, allow_patterns=[*TEXTS, "pytorch_model*.bin"], **options))
    return folder


def push(folder: Path, repository: str) -> None:
    """Uploads a folder to a repository of the hub, which is made if there is none.

    Raises:
        InputError: it is not yours, or there is no way to the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"{repository}: the hub did not take it ({str(error).splitlines()[0]})") from error
