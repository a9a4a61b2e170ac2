"""JSON values as columns: everything stays as it is written, and all rows together decide the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

ROWS_IN_BLOCK = 1000
"""Rows that are Python objects at a time while columns are made of them."""
MAX_NESTED = 200
"""Lists and objects within each other that a value may have: all that reads it recurses, and Python allows 1000."""
TOO_DEEP = f"is nested more than {MAX_NESTED} deep: flatten it, or write it as text"


class JsonScalar(pa.ExtensionScalar):
    """A value of a `JsonType` column; `as_py` gives it as Python objects."""

    def as_py(self, **_: Any) -> Any:
        """The list, object or text."""
        return None if self.value is None else json.loads(self.value.as_py())


class JsonType(pa.ExtensionType):
    """Lists and objects, stored as JSON text.

    Arrow's own structs would give each object the keys of all others, and refuse objects of different shapes.
    """

    def __init__(self) -> None:
        super().__init__(pa.string(), "cads.json")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> JsonType:
        return cls()

    def __arrow_ext_scalar_class__(self) -> type[JsonScalar]:
        return JsonScalar


class WrittenFloat(float):
    """A number that remembers how it was written."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        """The number that `text` stands for."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def _constant(name: str) -> float | None:
    # pandas writes missing values as NaN.
    return None if name == "NaN" else WrittenFloat(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object has the keys {repeated} more than once: keep one of each")
    return members


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=WrittenFloat, parse_constant=_constant, strict=False)
"""Keeps the digits of numbers, and refuses objects that have a key twice."""


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table of all keys of all rows; a value is null where a row lacks the key.

    Text, numbers and truth values become strings, as they are written. A column in which any value is a list or an
    object has the type `JsonType`.

    Raises:
        ValueError: if a value or a key is no valid Unicode text, or a value is nested too deep.
    """
    blocks: list[dict[str, pa.Array]] = []
    sizes: list[int] = []
    block: list[Mapping[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == ROWS_IN_BLOCK:
            blocks.append(_block(block, sum(sizes)))
            sizes.append(len(block))
            block = []
    if block:
        blocks.append(_block(block, sum(sizes)))
        sizes.append(len(block))
    names = list(dict.fromkeys(name for columns in blocks for name in columns))
    return pa.table({name: _joined([columns.get(name) for columns in blocks], sizes) for name in names})


def as_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as Python objects.

    Nulls within JSON stay as they are written. Arrow gives each struct the keys of all structs of its column, and a key
    that it adds cannot be told from one that was written with a null: keys of structs without a value are left out.
    """
    columns = []
    for column in table.itercolumns():
        values = column.to_pylist()
        columns.append([_without_nulls(value) for value in values] if pa.types.is_nested(column.type) else values)
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def has_json(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are JSON text, or hold some: the type `Json` of `datasets`."""
    if getattr(kind, "extension_name", None) == "arrow.json":
        return True
    return pa.types.is_nested(kind) and any(has_json(kind.field(i).type) for i in range(kind.num_fields))


def decoded_json(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column for which `has_json` holds, with the lists and objects that the JSON text stands for.

    Keys of structs without a value are left out, as in `as_rows`.
    """
    values = (_decoded(value, column.type) for value in column.to_pylist())
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.chunked_array([pa.ExtensionArray.from_storage(JsonType(), pa.array(texts, pa.string()))])


def _decoded(value: Any, kind: pa.DataType) -> Any:
    if value is None or not has_json(kind):
        return _without_nulls(value)
    if isinstance(value, str):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _decoded(inner, kind.field(name).type) for name, inner in value.items() if inner is not None}
    return [_decoded(inner, kind.value_type) for inner in value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _block(rows: list[Mapping[str, Any]], first: int) -> dict[str, pa.Array]:
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        if not _is_unicode(name):
            row = next(i for i, row in enumerate(rows) if name in row)
            raise ValueError(
                f"the key {name!r} of row {first + row} (from 0) holds half a surrogate pair, which is no character: "
                "repair it"
            )
    return {name: _column([row.get(name) for row in rows], name, first) for name in names}


def _column(values: list[Any], name: str, first: int) -> pa.Array:
    nested = any(isinstance(value, dict | list) for value in values)
    texts = [_encoded(value) if nested else _written(value) for value in values]
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        if nested and text is not None and _is_deep(value, text):
            raise ValueError(f"{name!r} of row {first + i} (from 0) {TOO_DEEP}")
    try:
        column = pa.array(texts, pa.string())
    except UnicodeEncodeError as error:
        row = next(i for i, text in enumerate(texts) if text is not None and not _is_unicode(text))
        raise ValueError(
            f"{name!r} of row {first + row} (from 0) holds half a surrogate pair, which is no character: repair it"
        ) from error
    return pa.ExtensionArray.from_storage(JsonType(), column) if nested else column


def _joined(chunks: list[pa.Array | None], sizes: list[int]) -> pa.ChunkedArray:
    """The blocks of one column. Blocks of plain values become JSON if another one holds lists or objects."""
    nested = any(isinstance(chunk, pa.ExtensionArray) for chunk in chunks)
    kind = JsonType() if nested else pa.string()
    columns = []
    for chunk, size in zip(chunks, sizes, strict=True):
        plain = pa.nulls(size, pa.string()) if chunk is None else chunk
        if nested and not isinstance(plain, pa.ExtensionArray):
            storage = pa.array([_encoded(text) for text in plain.to_pylist()], pa.string())
            plain = pa.ExtensionArray.from_storage(kind, storage)
        columns.append(plain)
    return pa.chunked_array(columns, kind)


def _written(value: Any) -> str | None:
    """A value that is neither a list nor an object, as it is written in JSON; text without its quotes."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, WrittenFloat):
        return value.text
    return json.dumps(value)


def _encoded(value: Any) -> str | None:
    """A value of a column with lists or objects, as JSON."""
    if value is None:
        return None
    return json.dumps(value if isinstance(value, dict | list) else _written(value), ensure_ascii=False)


def _is_deep(value: Any, text: str) -> bool:
    """Whether a value, of which `text` is the JSON, is nested more than `MAX_NESTED` deep."""
    if text.count("[") + text.count("{") <= MAX_NESTED:
        return False
    level, depth = [value], 0
    while level and depth <= MAX_NESTED:
        nested = [x for x in level if isinstance(x, dict | list)]
        level = [inner for x in nested for inner in (x.values() if isinstance(x, dict) else x)]
        depth += bool(nested)
    return depth > MAX_NESTED


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
