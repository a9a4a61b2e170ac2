"""The files of a folder, local or remote (`s3://`, `gs://`, `hf://` and what else fsspec knows), and copies of them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cads.errors import ConfigError, DataError
from cads.runtime.signals import Interrupted

log = logging.getLogger(__name__)

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
"""The package that reads each kind of address."""
VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""What a store calls the state of a file: the first that is there is used."""


@dataclass(frozen=True)
class DataFile:
    """A file of data.

    Attributes:
        location: its path or address.
        name: its path within the folder that was listed.
        size: bytes.
        version: changes with its contents, as far as the store can tell.
    """

    location: str
    name: str
    size: int
    version: str

    def to_json(self) -> dict[str, Any]:
        """The fields but the location, as JSON values: a folder may move."""
        return {"name": self.name, "size": self.size, "version": self.version}


def is_remote(location: str) -> bool:
    """Whether a location is an address, not a path."""
    return "://" in location


def list_files(location: str, suffixes: Sequence[str]) -> list[DataFile]:
    """The files under a folder, or the file itself, by name. Hidden files, and those of other suffixes, are left out.

    Raises:
        DataError: if there is none, or the store cannot be read.
        ConfigError: if the package that reads such addresses is missing.
    """
    if not is_remote(location):
        return _local_files(Path(location), suffixes)
    with _store_errors(location):
        store, path = _store(location)
        if store.isfile(path):
            infos = {path: store.info(path)}
            root = path.rpartition("/")[0]
        else:
            infos, root = store.find(path, detail=True), path
        protocol = location.partition("://")[0]
        files = [
            DataFile(f"{protocol}://{file}", file[len(root) :].lstrip("/"), int(info["size"]), _version(info))
            for file, info in infos.items()
        ]
    return _usable(files, location, suffixes)


@contextmanager
def local_copy(file: DataFile) -> Iterator[Path]:
    """The file as a local path: itself, or a copy that is removed when the block ends.

    Raises:
        DataError: if it cannot be read, or has changed since it was listed.
    """
    if not is_remote(file.location):
        yield Path(file.location)
        return
    with tempfile.TemporaryDirectory(prefix="cads-") as folder:
        copy = Path(folder) / Path(file.name).name
        with _store_errors(file.location):
            store, path = _store(file.location)
            version = _version(store.info(path))
            if version == file.version:
                store.get_file(path, str(copy))
        if version != file.version or copy.stat().st_size != file.size:
            raise DataError(f"{file.location} has changed since the pool was listed: begin anew in another folder")
        yield copy


def _local_files(root: Path, suffixes: Sequence[str]) -> list[DataFile]:
    if not root.exists():
        raise DataError(f"{root} does not exist: give a folder of files, or an address such as s3://bucket/folder")
    paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    base = root.parent if root.is_file() else root
    files = []
    for path in paths:
        status = path.stat()
        name = path.relative_to(base).as_posix()
        files.append(DataFile(os.path.join(base, name), name, status.st_size, str(status.st_mtime_ns)))
    return _usable(files, str(root), suffixes)


def _usable(files: list[DataFile], location: str, suffixes: Sequence[str]) -> list[DataFile]:
    shown = [file for file in files if not any(part.startswith((".", "_")) for part in file.name.split("/"))]
    usable = sorted((f for f in shown if f.name.lower().endswith(tuple(suffixes))), key=lambda file: file.name)
    others = sorted({file.name for file in shown} - {file.name for file in usable})
    if not usable:
        besides = f", but {len(others)} others, such as {others[0]!r}" if others else ""
        raise DataError(f"{location} holds no file of data ({', '.join(suffixes)}){besides}")
    if others:
        log.warning("%s: %d files are no data and not read, such as %s", location, len(others), others[:3])
    return usable


def _store(location: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it."""
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        protocol = location.partition("://")[0]
        raise ConfigError(
            f"{location}: reading {protocol}:// needs {PACKAGES.get(protocol, 'a package')}: "
            f"pip install {PACKAGES.get(protocol, protocol)} ({error})"
        ) from error
    # A long-lived process must see what was written meanwhile.
    store.invalidate_cache()
    return store, path.rstrip("/")


@contextmanager
def _store_errors(location: str) -> Iterator[None]:
    """Turn what a store raises into a `DataError`."""
    try:
        yield
    except (Interrupted, ConfigError, DataError):
        raise
    except Exception as error:  # each store has exceptions of its own
        raise DataError(f"{location} cannot be read: {type(error).__name__}: {error}") from error


def _version(info: dict[str, Any]) -> str:
    value = next((info[name] for name in VERSIONS if info.get(name) is not None), info["size"])
    # Some stores give times as numbers in one call and as dates in another.
    return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
