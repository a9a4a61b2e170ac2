"""Where the examples of a pool were read: the files, the row of each example, and hashes of the files' contents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any

import numpy as np

from cads.errors import DataError

ROW_DIGEST = 8
"""Bytes in the hash of one row: what tells rows of one file apart, not what guards against forgery."""

LONGEST_SCALAR = 40
"""Characters of the longest number or date that readers are known to recognise."""
MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""Texts that pandas reads as missing values."""
BOOLEANS = ("true", "false")
NUMERIC = tuple("0123456789+-.")
"""First characters of numbers and dates."""
UNKNOWN = ""
"""Digest of a file that was changed before its contents were hashed: it is that of no data set."""
MAX_ROWS = 2**40
"""No file has more rows."""


@dataclass(frozen=True, eq=False)
class FileOrigin:
    """A file, or a data set, that examples were read from.

    Attributes:
        location: its path or name, as it was given.
        rows: number of its rows, the unused ones included.
        columns: its columns from which examples are written.
        hashed: the `digest`, or what computes it when it is first asked for: that reads every row.
        id_column: its column of ids; None if ids were made from row numbers.
        roles: the column of each role of an example, or the template of columns, such as prompt and response; None if
            that is not known.
    """

    location: str
    rows: int
    columns: tuple[str, ...]
    hashed: str | Callable[[], str]
    id_column: str | None = None
    roles: Mapping[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the contents of the columns, see `file_digest`; `UNKNOWN` if they can no longer be read."""
        return self.hashed if isinstance(self.hashed, str) else self.hashed()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FileOrigin) or self._labels != other._labels:
            return False
        # What computes equal digests is equal: then they need not be computed.
        return self.hashed == other.hashed or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self._labels)

    @property
    def _labels(self) -> tuple[Any, ...]:
        roles = None if self.roles is None else tuple(sorted(self.roles.items()))
        return self.location, self.rows, self.columns, self.id_column, roles

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "location": self.location,
            "rows": self.rows,
            "columns": list(self.columns),
            "digest": self.digest,
            "id_column": self.id_column,
            **({} if self.roles is None else {"roles": dict(self.roles)}),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FileOrigin:
        """The record of `to_json`.

        Raises:
            DataError: if a field has the wrong type. KeyError: if one is missing.
        """
        columns, id_column, rows = fields["columns"], fields["id_column"], fields["rows"]
        roles = fields.get("roles")
        texts = [fields["location"], fields["digest"], *columns, *([] if id_column is None else [id_column])]
        if roles is not None:
            if not isinstance(roles, dict):
                raise DataError(f"the file {fields['location']!r:.60} has roles that are no mapping")
            texts += roles.values()
        if not isinstance(columns, list) or not all(isinstance(x, str) for x in texts):
            raise DataError(f"the file {fields['location']!r:.60} has fields that are no text")
        if type(rows) is not int or not 0 <= rows < MAX_ROWS:
            raise DataError(f"the file {fields['location']!r:.60} has {rows!r:.60} rows")
        return cls(fields["location"], rows, tuple(columns), fields["digest"], id_column, roles)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each of N examples was read.

    Attributes:
        files: all files.
        file: the index in `files` of each example, int32, shape (N,).
        row: the row of each example in its file, counted from 0, int64, shape (N,).

    Raises:
        DataError: if an example is in no file, is beyond its end, or shares its row with another one.
    """

    files: tuple[FileOrigin, ...]
    file: np.ndarray
    row: np.ndarray

    def __post_init__(self) -> None:
        if self.file.shape != self.row.shape or self.file.ndim != 1:
            raise DataError(f"{self.row.shape} rows for {self.file.shape} files")
        if not len(self.file):
            return
        if self.file.min() < 0 or self.file.max() >= len(self.files):
            raise DataError(f"examples are of files outside 0..{len(self.files) - 1}")
        sizes = np.array([file.rows for file in self.files], dtype=np.int64)
        if self.row.min() < 0 or (self.row >= sizes[self.file]).any():
            raise DataError("examples are of rows beyond the end of their file")
        starts = np.cumsum(sizes) - sizes
        if len(np.unique(starts[self.file] + self.row)) < len(self.row):
            raise DataError("two examples are of one row of a file")

    def __len__(self) -> int:
        return len(self.row)

    def take(self, positions: np.ndarray) -> Origin:
        """The examples at `positions`, int64."""
        return Origin(self.files, self.file[positions], self.row[positions])


def join_origins(parts: Sequence[tuple[FileOrigin | None, np.ndarray]]) -> Origin | None:
    """The origin of examples of several files, one after another; None if one file is unknown.

    Args:
        parts: a file, and the rows of the examples read from it, int64, shape (n,). A file may come more than once;
            with rows that it has been read for before, it counts as a copy of itself.
    """
    if not parts or any(file is None for file, _ in parts):
        return None
    files: list[FileOrigin] = []
    taken: list[np.ndarray] = []
    codes = []
    for file, rows in parts:
        assert file is not None
        same = (i for i, other in enumerate(files) if other == file and not np.isin(rows, taken[i]).any())
        code = next(same, len(files))
        if code == len(files):
            files.append(file)
            taken.append(rows)
        else:
            taken[code] = np.concatenate([taken[code], rows])
        codes.append(np.full(len(rows), code, dtype=np.int32))
    return Origin(tuple(files), np.concatenate(codes), np.concatenate([rows for _, rows in parts]).astype(np.int64))


def row_hashes(columns: Sequence[Iterable[Any]]) -> np.ndarray:
    """A hash of the contents of each row, uint64, shape (n,).

    Readers differ in what they take for a number, a date, a truth value, JSON or a missing value. Texts that stand for
    the same one are equal.

    Args:
        columns: the values of the rows, as Python values, one sequence a column.
    """
    hashes = [
        hashlib.blake2b("\0".join(map(_canonical, row)).encode("utf-8", "surrogatepass"), digest_size=ROW_DIGEST)
        for row in zip(*columns, strict=True)
    ]
    return np.frombuffer(b"".join(h.digest() for h in hashes), dtype="<u8")


def file_digest(hashes: np.ndarray) -> str:
    """The hash of a file's contents from those of its rows (uint64, shape (n,)), hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(hashes, dtype="<u8").data).hexdigest()


def _canonical(value: Any) -> str:
    """The text of a value, the same whichever reader it comes from."""
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value of text, lists and objects, without what is missing."""
    if isinstance(value, str):
        return _plain_text(value)
    if isinstance(value, Mapping):
        parts = {str(key): _plain(inner) for key, inner in value.items()}
        return {key: inner for key, inner in parts.items() if inner not in ("", [], {})}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return _plain_text(value.decode("utf-8", "replace"))
    if isinstance(value, date):
        return _plain_text(value.isoformat())
    return "" if value is None else _plain_text(str(value))


def _plain_text(text: str) -> Any:
    """A text; of what a reader may take for something else (JSON, a number, a date, nothing), one form of it."""
    first = text.lstrip()[:1]
    if first in ("[", "{"):
        try:
            parsed = json.loads(text)
            return _plain(parsed) if isinstance(parsed, list | dict) else text
        except (ValueError, RecursionError):
            return text
    if len(text) > LONGEST_SCALAR or not (text in MISSING or text.lower() in BOOLEANS or first in NUMERIC):
        return text
    if text in MISSING:
        return ""
    if text.lower() in BOOLEANS:
        return text.lower()
    for read in (int, float, datetime.fromisoformat):
        try:
            value = read(text)
        except (ValueError, OverflowError):
            continue
        if isinstance(value, datetime):
            return value.replace(tzinfo=None).isoformat()
        return str(int(value) if math.isfinite(value) and value == int(value) else value)
    return text
