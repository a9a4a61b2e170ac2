"""Which file is which of those that a pool was read from, by their contents."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cads.data.origin import FileOrigin, Origin, file_digest, row_hashes
from cads.errors import SelectionError
from cads.exports.row_blocks import read_blocks
from cads.tasks.language.tables import SUFFIXES

log = logging.getLogger(__name__)

SHOWN = 3
"""Files that a message names."""


@dataclass(frozen=True)
class PoolFile:
    """A file that holds, unchanged, what the pool was read from.

    Attributes:
        index: of its record in the files of the pool's origin.
        path: where it is now.
    """

    index: int
    path: Path


def recorded_files(origin: Origin, wanted: Collection[int]) -> list[PoolFile]:
    """The files where the pool was read from them.

    Args:
        origin: of the pool. wanted: indices of the files.

    Raises:
        SelectionError: if one is not there, or has been changed.
    """
    matches = []
    for i in sorted(wanted):
        file, path = origin.files[i], Path(origin.files[i].location)
        if not path.exists():
            raise SelectionError(_not_there(file))
        if not _holds(_contents(path, [file]), file):
            raise SelectionError(
                f"{path} is not what the pool was read from, it was changed since: give the file as it was (FILES)"
            )
        matches.append(PoolFile(i, path))
    return matches


def given_files(origin: Origin, wanted: Collection[int], paths: Sequence[Path]) -> list[PoolFile]:
    """The files of the pool that are at `paths`, in the order of the pool; those that are not are named in a warning.

    Of files with equal contents, each is the one whose path ends most like its own.

    Args:
        origin: of the pool. wanted: indices of the files that are needed. paths: of files, in any order.

    Raises:
        SelectionError: if one is none of the pool's files, or a copy of one that is not given.
    """
    matches: dict[int, Path] = {}
    for path in {path.resolve(): path for path in paths}.values():
        if not path.exists():
            raise SelectionError(f"{path} does not exist: give the files that the pool was read from")
        contents = _contents(path, origin.files)
        equal = [i for i, file in enumerate(origin.files) if i not in matches and _holds(contents, file)]
        if not equal:
            raise SelectionError(
                f"{path} is none of the files that the pool was read from ({_few(f.location for f in origin.files)}), "
                "or it was changed since: give these files as they were"
            )
        best = max(equal, key=lambda i: (_common_end(path, Path(origin.files[i].location)), -i))
        # A file that the pool was read from twice has two records.
        matches |= {i: path for i in equal if origin.files[i].location == origin.files[best].location}
    _check_copies(matches, origin)
    if absent := sorted(set(wanted) - set(matches)):
        log.warning(
            "%d of %d files with selected examples are not given: %s",
            len(absent),
            len(wanted),
            _few(origin.files[i].location for i in absent),
        )
    return [PoolFile(i, matches[i]) for i in sorted(set(wanted) & set(matches))]


def _contents(path: Path, files: Iterable[FileOrigin]) -> dict[tuple[str, ...], tuple[int, str]]:
    """The number of rows at `path`, and the digest of the columns of each of `files`, by these columns."""
    parts: dict[tuple[str, ...], list[np.ndarray]] = {file.columns: [] for file in files}
    for block in read_blocks(path):
        for columns, hashes in parts.items():
            hashes.append(row_hashes([block.values(name) for name in columns]))
    file_hashes = {columns: np.concatenate([np.empty(0, np.uint64), *hashes]) for columns, hashes in parts.items()}
    return {columns: (len(hashes), file_digest(hashes)) for columns, hashes in file_hashes.items()}


def _holds(contents: dict[tuple[str, ...], tuple[int, str]], file: FileOrigin) -> bool:
    return contents[file.columns] == (file.rows, file.digest)


def _not_there(file: FileOrigin) -> str:
    if any(suffix.lower() in SUFFIXES for suffix in Path(file.location).suffixes):
        return (
            f"{file.location}, which the pool was read from, does not exist here: give the files where they are now "
            "(FILES), or start the command in the folder where `cads select` was started"
        )
    return (
        f"{file.location}, which the pool was read from, is no file here. If it is a data set of the hub, its rows are "
        "chosen in Python, by selection.apply(datasets.load_dataset(...)); if it is a folder that was moved, give it "
        "(FILES)"
    )


def _common_end(one: Path, other: Path) -> int:
    """How many names at the end of two paths are equal."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one.parts), len(other.parts)))


def _check_copies(given: Collection[int], origin: Origin) -> None:
    for i in given:
        for j in set(range(len(origin.files))) - set(given):
            one, other = origin.files[i], origin.files[j]
            if (one.columns, one.digest) == (other.columns, other.digest):
                raise SelectionError(
                    f"{one.location} and {other.location} have the same contents, so that the rows of one cannot be "
                    "told from those of the other: give all files of the pool"
                )


def _few(names: Iterable[str]) -> str:
    every = list(names)
    first_names = ", ".join(every[:SHOWN])
    return first_names if len(every) <= SHOWN else f"{first_names} and {len(every) - SHOWN} more"
