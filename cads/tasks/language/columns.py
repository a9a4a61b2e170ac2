"""Columns of text data: which column stands for what, known shapes of data, and columns made of others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from string import Formatter
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from cads.errors import ConfigError, DataError

Format = Literal["messages", "prompt", "text"]

NEEDED: dict[Format, tuple[str, ...]] = {"messages": ("messages",), "prompt": ("prompt", "response"), "text": ("text",)}
"""The roles that a format needs a column for."""
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools"),
    "prompt": ("context", "system", "history", "tools"),
    "text": (),
}
"""The further roles of a format."""
LABELS = ("id", "source", "subtask")
"""Roles of columns that describe a row and are no part of its text."""
STRUCTURED = ("messages", "history", "tools")
"""Roles of columns that hold more than text."""
COLUMNS = ("messages", "prompt", "context", "response", "text", "system", "history", "tools", *LABELS)
"""Roles that a column can have."""

PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("inputs", "targets"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("question", "output"),
    ("input", "output"),
    ("input", "target"),
    ("document", "summary"),
)
"""Pairs of columns that are recognised as prompt and response, the first that is present; case does not matter."""
KNOWN = {
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text", "content"),
    "context": ("context", "input", "passage"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
}
"""Columns that are recognised as a role, the first that is present; case does not matter."""
PREFERENCES = ("chosen", "rejected")
SHOWN_VALUES, SHOWN_LENGTH = 3, 40
"""Values of an unused column that are shown."""
SEARCHED_ROWS = 1000
"""Rows in which they are looked for."""


class UnknownColumnsError(DataError):
    """Columns whose names do not say what they are."""


def assign_columns(
    present: Sequence[str], chosen: Format | None, given: Mapping[str, str], location: str
) -> tuple[Format, dict[str, str]]:
    """The format, and the column or template of each role; those that are not given are recognised.

    Where all roles that the format needs are given, no further text is guessed.

    Args:
        present: names of the columns. chosen: the format, or None. given: column or template by role.
        location: of the data, for messages.

    Raises:
        ConfigError: if a template cannot be read, or stands for a role that is no text.
        DataError: if a column is missing, or no format fits.
    """
    _check_given(present, given, location)
    columns = {"id": "id", **given} if "id" in present else dict(given)
    if chosen is None:
        complete = [f for f in get_args(Format) if set(NEEDED[f]) <= set(columns)]
        chosen = complete[0] if complete else _recognised_format(present, given, location)
    missing = [role for role in NEEDED[chosen] if role not in columns]
    if not missing:
        return chosen, columns
    for role, name in _needed(chosen, present, columns).items():
        columns.setdefault(role, name)
    absent = [role for role in NEEDED[chosen] if role not in columns]
    if absent:
        raise DataError(
            f"{location} has no column for {absent[0]}, which format = {chosen} needs: name it in columns (it has "
            f"{list(present)})"
        )
    used = used_columns(columns.values(), present)
    for role in OPTIONAL[chosen]:
        known = _first(KNOWN[role], [c for c in present if c not in used])
        if role not in columns and known is not None:
            columns[role] = known
            used.add(known)
    order = {role: i for i, role in enumerate((*NEEDED[chosen], *OPTIONAL[chosen]))}
    return chosen, dict(sorted(columns.items(), key=lambda item: order.get(item[0], len(order))))


def used_columns(specifications: Iterable[str], present: Sequence[str]) -> set[str]:
    """The columns that are named, or stand in a template."""
    used: set[str] = set()
    for given in specifications:
        used.update(template_fields(given) if is_template(given, present) else [given])
    return used


def is_template(given: str, present: Sequence[str]) -> bool:
    """Whether a value of `columns` is a template such as "{instruction} {input}", and not the name of a column."""
    return given not in present and ("{" in given or "}" in given)


def template_fields(template: str) -> list[str]:
    """The columns that stand in a template.

    Raises:
        ConfigError: if it cannot be read.
    """
    return [name for _, name in _parts(template) if name is not None]


def fill_template(table: pa.Table, template: str, location: str) -> pa.ChunkedArray:
    """A template, filled for each row. A missing value is empty; where all are missing or blank, so is the text.

    Raises:
        DataError: if a column holds neither text nor numbers.
    """
    fields = {name: _texts(table, name, location) for name in template_fields(template)}
    empty = pa.scalar("", pa.string())
    pieces: list[pa.ChunkedArray | pa.Scalar] = []
    for literal, name in _parts(template):
        pieces.append(pa.scalar(literal, pa.string()))
        if name is not None:
            pieces.append(pc.fill_null(fields[name], empty))
    joined = pc.binary_join_element_wise(*pieces, empty)
    has_text = [pc.not_equal(pc.utf8_trim_whitespace(pc.fill_null(x, empty)), empty) for x in fields.values()]
    text = pc.if_else(reduce(pc.or_, has_text), joined, empty)
    return pc.if_else(reduce(pc.or_, [pc.is_valid(x) for x in fields.values()]), text, pa.scalar(None, pa.string()))


def unused_columns(table: pa.Table, used: Iterable[str]) -> str | None:
    """The columns that are not used, with three values of each, as text; None if there are none."""
    unused = [name for name in table.column_names if name not in set(used)]
    if not unused:
        return None
    return "; ".join(f"{name} ({', '.join(_some_values(table[name]))})" for name in unused)


def _check_given(present: Sequence[str], given: Mapping[str, str], location: str) -> None:
    for role, value in given.items():
        if is_template(value, present) and role in STRUCTURED:
            raise ConfigError(f"columns.{role} = {value!r}: a template gives text, and {role} is none: name a column")
        if is_template(value, present) and not template_fields(value):
            raise ConfigError(f"columns.{role} = {value!r}: a template needs a column in braces, such as {{input}}")
    absent = sorted(used_columns(given.values(), present) - set(present))
    if absent:
        inner = [name for name in absent if re.split(r"[.\[/]", name)[0] in present]
        remedy = f"; {inner} lie within a column: write them as columns of their own" if inner else ""
        raise DataError(f"{location} has no columns {absent}: it has {list(present)}{remedy}")


def _recognised_format(present: Sequence[str], given: Mapping[str, str], location: str) -> Format:
    """The format that the names of the columns suggest; the columns that are given go first."""
    for chosen in get_args(Format):
        wanted = [role for role in NEEDED[chosen] if role in given]
        if wanted and set(NEEDED[chosen]) <= {*given, *_needed(chosen, present, given)}:
            return chosen
    for chosen in get_args(Format):
        if set(NEEDED[chosen]) <= set(_needed(chosen, present, {})):
            return chosen
    if all(_first([name], present) for name in PREFERENCES):
        raise DataError(
            f"{location} has preference pairs (columns {list(present)}), and cads learns from one answer: name it, "
            "such as columns: {prompt: prompt, response: chosen}, or {messages: chosen} where it is a conversation"
        )
    raise UnknownColumnsError(
        f"{location} has columns {list(present)}, in which no format is recognised: rename them to messages, to prompt "
        f"and response, or to text; or say which is which, such as pool: [{{path: {location}, columns: "
        "{prompt: question, response: answer}}]"
    )


def _needed(chosen: Format, present: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The columns that are recognised as the roles that a format needs, beside those that are given."""
    if chosen != "prompt":
        name = _first(KNOWN[chosen], present)
        return {} if name is None else {chosen: name}
    free = [c for c in present if c not in used_columns(given.values(), present)]
    for prompt, response in PAIRS:
        pair = {"prompt": _first([prompt], free), "response": _first([response], free)}
        matches = {role: name for role, name in pair.items() if role not in given and name is not None}
        if len(matches) == sum(role not in given for role in pair):
            return matches
    return {}


def _first(names: Iterable[str], present: Sequence[str]) -> str | None:
    """The first of `names` that is a column: as it is written, or else in any case."""
    in_any_case = {column.lower(): column for column in reversed(present)}
    return next((n if n in present else in_any_case[n] for n in names if n in present or n in in_any_case), None)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Literal text, and the column that follows it, in order."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"the template {template!r} in columns cannot be read ({error}): write columns in braces, such as "
            "{instruction}, and a brace itself twice"
        ) from error
    for _, name, specification, conversion in parsed:
        if name == "" or specification or conversion:
            raise ConfigError(
                f"the template {template!r} in columns needs the name of a column in each pair of braces, and nothing "
                "else"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _texts(table: pa.Table, name: str, location: str) -> pa.ChunkedArray:
    column = table[name]
    if pa.types.is_nested(column.type) or isinstance(column.type, pa.BaseExtensionType):
        values = column.to_pylist()
        if not all(value is None or isinstance(value, str | int | float) for value in values):
            raise DataError(f"column {name!r} of {location} is {column.type}: in a template it must be text or numbers")
        return pa.chunked_array([[None if value is None else str(value) for value in values]], pa.string())
    try:
        return pc.cast(column, pa.string())
    except pa.ArrowException as error:
        raise DataError(
            f"column {name!r} of {location} is {column.type} and no text ({error}): in a template it must be text or "
            "numbers"
        ) from error


def _some_values(column: pa.ChunkedArray) -> list[str]:
    """The first values that differ, shortened."""
    values: dict[str, None] = {}
    for value in column.slice(0, SEARCHED_ROWS):
        values[_shortened(value)] = None
        if len(values) == SHOWN_VALUES:
            break
    return list(values)


def _shortened(value: pa.Scalar) -> str:
    """The beginning of a value; Python has none for some, such as a date of the year 10000."""
    try:
        if isinstance(value, pa.ListScalar):
            # A long list costs what its beginning does.
            return f"{value.values[:SHOWN_LENGTH].to_pylist()!r:.{SHOWN_LENGTH}}" if value.is_valid else "None"
        python = value.as_py()
    except (ValueError, OverflowError):
        return f"{value.cast(pa.string()).as_py():.{SHOWN_LENGTH}}"
    return f"{python[:SHOWN_LENGTH] if isinstance(python, str | bytes) else python!r:.{SHOWN_LENGTH}}"
