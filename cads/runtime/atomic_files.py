"""Atomic writes: a folder or file appears under its name only once it is complete and synced to the disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`; it replaces `folder` when the block ends without an error.

    Yields:
        the temporary folder; it is removed if the block fails.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            sync(path)
        remove_folder(folder)
        os.replace(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def published_once(folder: Path | str) -> Iterator[Path]:
    """Fill a temporary folder beside `folder`, which it becomes when the block ends without an error.

    If another process has published the same folder meanwhile, that one stays: equal work gives equal files.

    Yields:
        the temporary folder; it is removed if the block fails.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            sync(path)
        try:
            # A folder with contents is never replaced by a rename.
            os.rename(partial, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def files_into(folder: Path, name: str, *, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Fill a temporary folder within `folder`; if the block ends without an error, its files move into `folder`.

    Other files of `folder` stay. Each file appears whole; all files together do not appear at once.

    Args:
        name: what the files are; the temporary folder is called `.NAME.` and some letters.
        replaced: patterns of files that are removed before the new ones move in.

    Yields:
        the temporary folder; it is removed if the block fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            if path.is_file():
                path.chmod(0o644)
                sync(path)
        for stale in [path for pattern in replaced for path in folder.glob(pattern)]:
            stale.unlink()
        for path in sorted(partial.iterdir()):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
        sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Write a temporary file beside `path`; it replaces `path` when the block ends without an error.

    Yields:
        the temporary file, which is empty; it is removed if the block fails.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def whole_file(path: Path, content: str) -> None:
    """Write text to `path`, all of it or nothing."""
    with atomic_file(path) as partial:
        partial.write_text(content, encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it, so that no half-removed folder ever has its name. A link is unlinked."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        doomed = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
