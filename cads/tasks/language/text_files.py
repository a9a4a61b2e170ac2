"""JSON, JSON lines, CSV and TSV files as tables, plain or compressed. All values are read as they are written."""

from __future__ import annotations

import codecs
import csv
import io
import lzma
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa

from cads.tasks.language.written_json import DECODER, ROWS_IN_BLOCK, TOO_DEEP, table_of

COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
"""How a compressed file begins; the suffix of its name does not matter."""
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the encodings that they stand for; UTF-32 before UTF-16, which begins alike."""
BLANKS = re.compile(r"\s*")
GUESS = b"cads.guess"
"""Key of the metadata of a table under which it stands how the file was read where that is a guess."""
LAYOUT = "give one object a line, or one list of objects"
"""What a JSON file may hold."""
CONTAINERS = ("data", "rows", "train", "test", "validation", "examples", "instances", "items", "records", "samples")
"""Keys under which files that are one object hold their rows."""


def read_json(path: Path) -> pa.Table:
    """The rows of a JSON file (`json_rows`) as a table; see `table_of`.

    Raises:
        ValueError: naming the line, if it is no such file, or not UTF-8.
    """
    return table_of(json_rows(path))


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one object a line, with objects one after another, or with one list of objects.

    Files with one object a line are read line by line. Numbers keep their digits (`WrittenFloat`).

    Raises:
        ValueError: naming the line, if it is none of these, or not UTF-8.
    """
    with _opened(path) as text:
        lines = enumerate(text, 1)
        number, first = next(((n, line) for n, line in lines if line.strip()), (1, ""))
        if _is_object(first) or not first.strip():
            yield from _whole_rows(_lines(chain([(number, first)], lines)))
            return
        values = list(_values("\n" * (number - 1) + first + text.read()))
    if len(values) == 1 and isinstance(values[0], list):
        if not all(isinstance(row, dict) for row in values[0]):
            raise ValueError("every entry of the list must be an object")
        yield from values[0]
        return
    if not all(isinstance(row, dict) for row in values):
        raise ValueError(f"it holds more than objects: {LAYOUT}")
    yield from _whole_rows(iter(values))


def read_tsv(path: Path) -> pa.Table:
    """A file with a header and with tabs between values; all columns are text.

    It is read as CSV is. Where the quotes do not fit, and the header has none, they are taken for text, as most tools
    that write tabs take them; `GUESS` in the metadata of the table says so.

    Raises:
        ValueError: as `read_csv`, if it cannot be read in either way.
    """
    try:
        return read_csv(path, "\t")
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        as_csv = error
    try:
        table = read_csv(path, "\t", csv.QUOTE_NONE)
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise as_csv from None
    if any('"' in name for name in table.column_names):
        raise as_csv
    return table.replace_schema_metadata(
        {GUESS: f"its double quotes are read as text, as they do not fit quoted values ({as_csv})"}
    )


def read_csv(path: Path, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> pa.Table:
    """A file with a header; all columns are text.

    Args:
        quoting: `csv.QUOTE_MINIMAL` if values may be quoted, `csv.QUOTE_NONE` if quotes are text.

    Raises:
        ValueError: naming the line, if values and header do not fit, a quote is not closed, a name is there twice, or
            it is not UTF-8.
    """
    with _opened(path, newline="") as text, _long_values():
        reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)
        lines = _quotes_closed(reader)
        header = next((row for row in lines if row), [])
        _check_header(header, delimiter)
        kind = pa.schema([(str(i), pa.string()) for i in range(len(header))])
        batches, block = [], []
        for row in lines:
            if row and len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} values and the header {len(header)} names: give one value "
                    f"to each name, and write values that hold {delimiter!r} in quotes"
                )
            if row:
                block.append(row)
            if len(block) == ROWS_IN_BLOCK:
                batches.append(_batch(block, kind))
                block = []
        if block:
            batches.append(_batch(block, kind))
    return pa.Table.from_batches(batches, kind).rename_columns(header)


def _quotes_closed(reader: Any) -> Iterator[list[str]]:
    """The rows of a `csv.reader`.

    Raises:
        ValueError: naming the line, where the quotes of a value do not fit.
    """
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num}: {error}: a value that begins with a double quote ends with one, and holds others "
            "twice; write it so"
        ) from error


def not_utf8(path: Path) -> str:
    """Which line of a file is not UTF-8, and what to do."""
    remedy = "write it as UTF-8, such as by `iconv -f LATIN1 -t UTF-8` if it is Latin-1"
    with _binary(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                around = line[max(0, error.start - 20) : error.end + 10].decode("utf-8", "backslashreplace")
                return f"{path} is not UTF-8: line {number} has the byte {line[error.start]:#x} in {around!r}: {remedy}"
    return f"{path} is not in the encoding that its byte order mark says: {remedy}"


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The file as text, decompressed; UTF-8, or what a byte order mark says."""
    with _binary(path) as file:
        start = file.read(4)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in start:
        raise ValueError("it begins with zero bytes, as UTF-16 or a binary file does: write it as UTF-8 text")
    with _binary(path) as file, io.TextIOWrapper(file, encoding=encoding, newline=newline) as text:
        yield text


def _binary(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        start = file.read(16)
    codec = next((name for name, magic in COMPRESSED.items() if magic.match(start)), None)
    if codec is None:
        return path.open("rb")
    if codec == "xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression=codec)))


def _is_object(line: str) -> bool:
    try:
        return isinstance(DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        # Of a line with a whole object, the reader of lines says what is wrong.
        return line.strip()[:1] == "{" and line.strip()[-1:] == "}"


def _lines(lines: Iterator[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = DECODER.decode(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error}): {LAYOUT}") from error
        except RecursionError as error:
            raise ValueError(f"line {number} {TOO_DEEP}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object: {LAYOUT}")
        yield row


def _values(text: str) -> Iterator[Any]:
    """JSON values, one after another."""
    position = _after_blanks(text, 0)
    while position < len(text):
        try:
            value, end = DECODER.raw_decode(text, position)
        except ValueError as error:
            raise ValueError(f"it is no JSON ({error}): {LAYOUT}") from error
        except RecursionError as error:
            line = text.count("\n", 0, position) + 1
            raise ValueError(f"what begins on line {line} {TOO_DEEP}") from error
        yield value
        position = _after_blanks(text, end)


def _after_blanks(text: str, position: int) -> int:
    blanks = BLANKS.match(text, position)
    return position if blanks is None else blanks.end()


def _whole_rows(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows, unless there is only one, and it holds a whole data set.

    Raises:
        ValueError: saying where in the object the rows seem to be.
    """
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    if second is None:
        _check_single(first)
    yield first
    if second is not None:
        yield second
    yield from rows


def _check_single(row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        if name in CONTAINERS and isinstance(value, list) and all(isinstance(x, dict) for x in value):
            raise ValueError(f"it is one object, whose rows seem to be the list {name!r}: give that list alone")
    if len(row) > 1 and all(isinstance(value, dict) and "0" in value for value in row.values()):
        raise ValueError(
            "it is one object with a value for each column, as pandas writes: use to_json(orient='records', lines=True)"
        )
    lists = [value for value in row.values() if isinstance(value, list)]
    has_turns = any(isinstance(x, dict) for value in lists for x in value)
    is_columnar = len(lists) == len(row) > 1 and len({len(value) for value in lists}) == 1 < len(lists[0])
    if is_columnar and not has_turns:
        raise ValueError(f"it is one object with a list for each column: {LAYOUT}")


def _check_header(header: list[str], delimiter: str) -> None:
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise ValueError(f"its header has the names {repeated} more than once: rename or remove the others")
    other = next((mark for mark in ";\t|," if mark != delimiter and header and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        raise ValueError(
            f"its header is one name, {header[0]!r}, with {other!r} in it: values are separated by commas in a .csv, "
            "and by tabs in a .tsv; save it so"
        )


@contextmanager
def _long_values() -> Iterator[None]:
    """Lets the csv module read values of any length; by default it refuses those beyond 128 KB."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _batch(rows: list[list[str]], kind: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values, pa.string()) for values in zip(*rows, strict=True)], schema=kind)
