"""`cads glossary`: the words of tables, figures and messages, all of them or some; it imports little."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from cads.errors import ConfigError

NAME = "glossary.md"
WIDTH = 80
"""Columns of an entry."""
TERM = re.compile(r"\*\*(.+?)\*\*")
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


def glossary(words: Sequence[str]) -> int:
    """Print the entries that explain `words`, or all of them; returns the exit status of the command."""
    try:
        entries = read_entries(page().read_text("utf-8"))
    except ConfigError as error:
        print(f"cads glossary: {error}", file=sys.stderr)
        return 1
    found = entries
    if words:
        asked = " ".join(words).casefold()
        found = [entry for entry in entries if asked in terms_of(entry)]
        found = found or [entry for entry in entries if any(asked in term for term in terms_of(entry))]
    if not found:
        close = get_close_matches(asked, [term for entry in entries for term in terms_of(entry)], n=1)
        hint = f": did you mean {close[0]}?" if close else "; without a word all are listed"
        print(f"cads glossary: {asked!r} is not explained{hint}", file=sys.stderr)
        return 1
    for entry in found:
        print("\n".join(textwrap.wrap(TERM.sub(r"\1", LINK.sub(r"\1", entry)), WIDTH, subsequent_indent="  ")))
    return 0


def page() -> Path:
    """The page of the checkout, or the one that was installed.

    Raises:
        ConfigError: if there is none.
    """
    beside = Path(__file__).parents[2] / "docs" / NAME
    if beside.is_file():
        return beside
    try:
        installed = [file for file in files("cads-select") or () if file.name == NAME]
    except PackageNotFoundError:
        installed = []
    places = [Path(str(file.locate())) for file in installed]
    if not (places and places[0].is_file()):
        raise ConfigError(f"{NAME} is not installed: install cads-select again")
    return places[0]


def read_entries(text: str) -> list[str]:
    """The items of the lists of a page of Markdown, each on one line."""
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, flags=re.MULTILINE)
    return [" ".join(item.split()) for item in items]


def terms_of(entry: str) -> set[str]:
    """The terms that an entry explains, in lower case."""
    terms = [term.casefold() for term in TERM.findall(entry)]
    return {part for term in terms for part in (term, *term.split(", "))}
