"""A parser whose refusals say which setting is wrong, what it may be, and which name was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import NoReturn

from jsonargparse import ArgumentParser

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "dict": "a mapping of names to values",
    "list": "a list",
}
"""What values of a type are called."""
UNKNOWN = (
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<name>[^\s=]+)"),
)
"""Messages of jsonargparse and argparse about names that do not exist."""
ITEM = re.compile(r"Problem with given class_path '(?P<path>[\w.]+)'")
KEY = re.compile(r'Parser key "([^"]+)"')
VALUE = re.compile(r"(?:Got value|Given value): (.*)", re.DOTALL)
EXPECTED = re.compile(r"Expected an? (<class '[^']+'>|typing\.Literal\[[^\]]*\]|[\w.]+\[[^\n]*\])")

LITERAL = re.compile(r"typing\.Literal\[(.*?)\]")


class CommandParser(ArgumentParser):
    """A parser of jsonargparse that ends with a message in plain words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and how to see all settings, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        names = [action.dest for action in self._actions if action.dest not in (argparse.SUPPRESS, "help")]
        self.exit(2, f"{self.prog}: {readable(message, names)}\n`{self.prog} --help` lists all settings.\n")


def readable(message: str, names: Sequence[str]) -> str:
    """A message of jsonargparse in plain words; one that is of another kind stays as it is.

    Args:
        names: of all settings, sections before a dot, such as "task.n_pool".
    """
    item = ITEM.search(message)
    keys = KEY.findall(message)
    for pattern in UNKNOWN:
        match = pattern.search(message)
        if match is None:
            continue
        group = match.groupdict().get("group")
        name = f"{group}.{match['name']}" if group else match["name"]
        if item is not None and keys:
            return _unknown(name, _item_fields(item["path"]), f"an item of {keys[0]}: ")
        return _unknown(name, names)
    value = VALUE.search(message)
    kinds = [_in_words(text) for text in EXPECTED.findall(message)]
    if not keys or value is None or not kinds:
        return message
    words = list(dict.fromkeys(kinds))
    allowed = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    named = [name.strip() for literal in LITERAL.findall(message) for name in literal.replace("'", "").split(",")]
    close = difflib.get_close_matches(value[1].strip().strip("'\""), named, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    return f"{': '.join(keys)} = {value[1].strip()}: it must be {allowed}{hint}"


def _unknown(name: str, names: Iterable[str], where: str = "") -> str:
    known = list(names)
    section, _, field = name.rpartition(".")
    sections = {other.rpartition(".")[0] for other in known}
    # A setting of another section is meant as often as a misspelt one.
    nearest = [other for other in known if other.rpartition(".")[2] == field]
    for likely in [section, *difflib.get_close_matches(section, sections, n=1), *sorted(sections)]:
        fields_there = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == likely]
        close = difflib.get_close_matches(field, fields_there, n=1, cutoff=0.6 if likely == section else 0.75)
        nearest += [f"{likely}.{match}" if likely else match for match in close]
    return f"{where}{name} is unknown" + (f": did you mean {nearest[0]}?" if nearest else "")


def _item_fields(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    return [field.name for field in fields(getattr(import_module(module), name))]


def _in_words(kind: str) -> str:
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if literal is not None:
        return "one of " + literal[1].replace("'", "")
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind).split("[")[0].rsplit(".", 1)[-1]
    return KINDS.get(name.lower(), KINDS.get(name, name))
