"""Caches of tokens: what is fetched from one, what is in it, and what was said of it."""

from __future__ import annotations

import logging
from pathlib import Path

from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.token_cache import TokenCache
from tests.support.tiny_llama import sums, tokenizer, write_lines


def rows_of_sums(folder):
    return load_rows(TextSource(path=str(write_lines(folder / "rows.jsonl", sums(30)))), 0)


def fetch_tokens(cache, rows, tok=None, given=None, *, longest=100, separator="\n", chat=None, drop=False):
    """Fetches `rows`, or those that are given."""
    tok = tok or tokenizer()
    encoder = TokenEncoder(tok, Renderer(tok, separator, chat), longest, drop_unanswered=drop)
    return TokenCache(cache, encoder).fetch([given or rows])[0]


def warnings_of(caplog):
    """What was said since it was last asked for."""
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return said


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
