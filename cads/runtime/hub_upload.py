"""Uploading a folder to the hub: the only place that writes to the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cads.errors import ConfigError

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class UploadError(ConfigError):
    """A folder that could not be uploaded."""


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ConfigError: with the form.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is no name of a data set on the hub: give USER/NAME")


def upload_folder(folder: Path, repo_id: str, *, private: bool, token: str | None, message: str) -> str:
    """Make the data set if need be, and replace its contents by those of a folder in one commit; returns its address.

    Raises:
        UploadError: with the remedy.
    """
    import huggingface_hub

    api: Any = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=str(folder), commit_message=message, delete_patterns="*"
        )
    except Exception as error:  # The client raises errors of its own, of the network, and of the file system.
        raise UploadError(
            f"{repo_id} could not be written ({type(error).__name__}: {error}): log in by `hf auth login`, or give a "
            "token that may write there"
        ) from error
    return str(made)
