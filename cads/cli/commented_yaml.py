"""YAML with a comment above a field, and fields that are written as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 100
"""Columns of a comment."""


@dataclass(frozen=True)
class Off:
    """A value that is written as a comment, to be switched on."""

    value: Any


def commented_yaml(fields: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """The fields as YAML, in their order.

    Args:
        fields: values by name; mappings in it are sections. Lists of mappings have one item a line.
        comments: by dotted name, such as "task.model"; written above the field.
    """
    return "\n".join(_lines(fields, comments, "")) + "\n"


def _lines(fields: Mapping[str, Any], comments: Mapping[str, str], section: str) -> list[str]:
    lines: list[str] = []
    indent = "  " * (section.count(".") + 1) if section else ""
    for name, value in fields.items():
        dotted = f"{section}.{name}" if section else name
        for paragraph in comments.get(dotted, "").splitlines():
            lines += textwrap.wrap(paragraph, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        is_off = isinstance(value, Off)
        given, mark = (value.value, "# ") if isinstance(value, Off) else (value, "")
        if isinstance(given, Mapping) and not section and not is_off:
            lines += [f"{name}:", *_lines(given, comments, dotted)]
        elif isinstance(given, list) and given:
            lines.append(f"{indent}{mark}{name}:")
            lines += [f"{indent}{mark}  - {_flow(item)}" for item in given]
        else:
            lines.append(f"{indent}{mark}{name}: {_flow(given)}")
    return lines


def _flow(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip()
