"""The rows of a pool's files that a Selection chose, with their weight and source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cads.data.origin import Origin
from cads.errors import SelectionError
from cads.exports.pool_files import PoolFile, given_files, recorded_files
from cads.exports.row_blocks import RowBlock, read_blocks
from cads.selection import Selection


@dataclass(frozen=True)
class AddedColumns:
    """The names of the columns that an export adds; None for one that it does not add."""

    weight: str | None = "weight"
    source: str | None = "source"


@dataclass(frozen=True)
class ChosenRows:
    """Chosen rows of files, read again whenever they are asked for.

    Attributes:
        selection: that chose them.
        origin: its origin.
        files: that hold them.
        counts: how often each example comes, one after another, int64, shape (N,).
        added: columns.
    """

    selection: Selection
    origin: Origin
    files: Sequence[PoolFile]
    counts: np.ndarray
    added: AddedColumns

    def blocks(self) -> Iterator[RowBlock]:
        """The rows, in the order of the files and of their rows.

        Raises:
            SelectionError: if a file has a column of another content by the name of one that is added, or ends early.
        """
        for file in self.files:
            examples = np.flatnonzero((self.origin.file == file.index) & (self.counts > 0))
            examples = examples[np.argsort(self.origin.row[examples])]
            examples = np.repeat(examples, self.counts[examples])
            yield from self._of(file.path, examples)

    def _of(self, path: Path, examples: np.ndarray) -> Iterator[RowBlock]:
        """The rows of one file. examples: in the order of their rows, int64, shape (n,)."""
        rows = self.origin.row[examples]
        start = done = 0
        for block in read_blocks(path):
            end = int(np.searchsorted(rows, start + len(block)))
            if end > done:
                yield self._labelled(block.take(rows[done:end] - start), examples[done:end], path)
            start, done = start + len(block), end
            if done == len(rows):
                return
        if done < len(rows):
            raise SelectionError(f"{path} has {start} rows and had more before: it was changed meanwhile")

    def _labelled(self, block: RowBlock, examples: np.ndarray, path: Path) -> RowBlock:
        """The rows of a block with the columns that are added."""
        if self.added.weight is not None:
            weights = self.selection.weights[examples].tolist()
            block = _with_column(block, self.added.weight, weights, "weight", path)
        if self.added.source is not None and self.selection.sources is not None:
            sources = self.selection.sources.take(pa.array(examples)).cast(pa.string()).to_pylist()
            block = _with_column(block, self.added.source, sources, "source", path)
        return block


def chosen_rows(selection: Selection, counts: np.ndarray, paths: Sequence[Path], added: AddedColumns) -> ChosenRows:
    """The chosen rows of the files at `paths`, or, without paths, of the files where the pool was read from them.

    Args:
        counts: how often each example comes, int64, shape (N,).

    Raises:
        SelectionError: if it is not known where the examples were read, or files are not there or have been changed.
    """
    origin = selection.origin
    if origin is None:
        raise SelectionError(
            "this Selection does not say in which files its examples stand: its pool is made of images, synthetic, of "
            "a task of your own, or was read by an earlier version. The images of a folder are listed by --to files; "
            "rows of a data set with a column of ids are chosen in Python, by selection.apply(dataset, id_column=...)"
        )
    wanted = np.unique(origin.file[counts > 0]).tolist()
    files = given_files(origin, wanted, paths) if paths else recorded_files(origin, wanted)
    if not files:
        raise SelectionError("the files that are given hold no selected example: give the others of the pool")
    return ChosenRows(selection, origin, files, counts, added)


def _with_column(block: RowBlock, name: str, values: Sequence[Any], what: str, path: Path) -> RowBlock:
    """The block with a column; its own one of this name stays if it says the same.

    Raises:
        SelectionError: if it says something else.
    """
    stored = block.values(name)
    for value, new in zip(stored, values, strict=True):
        if value is not None and str(value) != str(new):
            raise SelectionError(
                f"{path} has a column {name!r} of its own, with {value!r:.60} where the {what} of the example is "
                f"{new!r:.60}: name the added column otherwise, such as --{what}_column cads_{what}, or leave it out "
                f"by --{what}_column null"
            )
    return block if None not in stored else block.with_column(name, values)
