"""Pool, target and test set from text sources: divided by rows, so that every tokenizer sees the same examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.pool import Pool
from cads.errors import DataError
from cads.tasks.language.encoding import Encoder, EncodingReport
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows, TextSource, load_rows
from cads.tasks.language.token_cache import TokenCache
from cads.tasks.language.tokens import Collected, Sequences

if TYPE_CHECKING:
    from cads.tasks.language.settings import LanguageSettings

SPLIT = 6
"""First word of the seeds by which rows are divided."""

Parts = list[Rows]
"""Rows of several sources, one after another."""
Encode = Callable[[Parts], tuple[Sequences, list[EncodingReport]]]
"""Makes the tokens of rows, or finds them, and says what became of the rows of each source."""


@dataclass(frozen=True)
class Split:
    """The rows of pool, target and test set, and whether the entries of the pool are its sources."""

    pool: Parts
    target: Parts
    test: Parts
    named: bool

    def kept_by(self, pool: Pool, target: Pool) -> Split:
        """Without the rows of pool and target that are not in these."""
        return replace(self, pool=_among(self.pool, pool.ids), target=_among(self.target, target.ids))


def divide(
    pool: Sequence[TextSource],
    target: Sequence[TextSource],
    test: Sequence[TextSource],
    sizes: tuple[int | None, int | None, int | None],
    seed: int,
) -> Split:
    """Load the rows and divide them.

    Without a target of its own it is drawn from the pool's rows; without a test set of its own, that is drawn
    from the target's rows if there are any, else from the pool's.

    Args:
        sizes: n_pool, n_target, n_test; None for the defaults of `LanguageConfig`.
        seed: of all that is drawn.

    Raises:
        DataError: if there are fewer rows than are asked for.
    """
    n_pool, n_target, n_test = sizes
    alone = len(pool) == 1
    candidates = [load_rows(s, seed, given_sources=alone) for s in pool]
    targets, tests = ([load_rows(s, seed) for s in given] for given in (target, test))
    if not tests:
        taken_from = targets or candidates
        available = _count(taken_from)
        wanted = n_test if n_test is not None else max(1, available // (2 if targets else 5))
        tests, rest = _draw(taken_from, wanted, seed, "test set")
        targets, candidates = (rest, candidates) if targets else (targets, rest)
    elif n_test is not None:
        tests, _ = _draw(tests, n_test, seed, "test set")
    if not targets:
        wanted = n_target if n_target is not None else max(1, _count(candidates) // 10)
        targets, candidates = _draw(candidates, wanted, seed, "target")
    elif n_target is not None:
        targets, _ = _draw(targets, n_target, seed, "target")
    if n_pool is not None:
        candidates, _ = _draw(candidates, n_pool, seed, "pool")
    return Split(candidates, targets, tests, named=not alone)


def encode_pools(
    split: Split, tokenizer: Any, settings: LanguageSettings, longest: int
) -> tuple[list[Pool], dict[str, Any]]:
    """The rows as pools of `Tokens`, in memory or mapped.

    Args:
        settings: how examples are written, and where their tokens are kept. longest: tokens at which they are cut.

    Returns:
        pool, target and test set; and what was cut and left out of each source of them, as JSON values.

    Raises:
        ConfigError: if the tokenizer lacks a chat template that is needed, or tokens cannot be kept where they should.
        DataError: if an example cannot be learned from, or tokens cannot be written.
    """
    renderer = Renderer(tokenizer, settings.separator, settings.chat)
    encoder = Encoder(tokenizer, renderer, longest, settings.packing, settings.drop)
    encode: Encode = partial(_in_memory, encoder)
    if settings.token_cache is not None:
        cache = TokenCache(settings.token_cache, encoder)
        cache.sweep()
        encode = cache.fetch
    made = [
        _pool(split.pool, encoder, encode, "pool", with_sources=True, named=split.named),
        _pool(split.target, encoder, encode, "target"),
        _pool(split.test, encoder, encode, "test set"),
    ]
    return [pool for pool, _ in made], {"max_tokens": longest, **{pool.name: counts for pool, counts in made}}


def _in_memory(encoder: Encoder, parts: Parts) -> tuple[Sequences, list[EncodingReport]]:
    collected = Collected()
    kept = [encoder.encode_into(rows, collected) for rows in parts]
    return collected.sequences(), kept


def _pool(
    parts: Parts,
    encoder: Encoder,
    encode: Encode,
    name: str,
    *,
    with_sources: bool = False,
    named: bool = False,
) -> tuple[Pool, list[dict[str, Any]]]:
    sequences, found = encode(parts)
    counts = [{"source": rows.name, **k.counts} for rows, k in zip(parts, found, strict=True)]
    kept = [rows.take(k.positions) if len(k.left_out) else rows for rows, k in zip(parts, found, strict=True)]
    ids = pa.concat_arrays([rows.ids for rows in kept])
    tokens = encoder.tokens(sequences, _subtasks(kept, name))
    if not with_sources or not (named or kept[0].sources is not None):
        return Pool(ids, tokens, name=name), counts
    # An entry with a source column has several sources, others are one.
    labels = pa.concat_arrays([x.sources if x.sources is not None else _repeated(x.name, len(x)) for x in kept])
    coded = labels.dictionary_encode()
    return Pool(ids, tokens, coded.indices.to_numpy(), coded.dictionary.to_pylist(), name=name), counts


def _subtasks(parts: Parts, name: str) -> np.ndarray | None:
    given = [rows.subtasks is not None for rows in parts]
    if not any(given):
        return None
    if not all(given):
        raise DataError(f"only some sources of the {name} have a subtask column: name one for each, or for none")
    labels = pa.concat_arrays([rows.subtasks for rows in parts])
    codes: np.ndarray = pc.dictionary_encode(labels).indices.to_numpy().astype(np.int64)
    return codes


def _repeated(name: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(name, pa.string()), count)


def _among(parts: Parts, ids: pa.Array) -> Parts:
    """The rows with these ids, of which each is there."""
    if _count(parts) == len(ids):
        return parts
    masks = [pc.is_in(rows.ids, value_set=ids).to_numpy(zero_copy_only=False) for rows in parts]
    return [rows.take(np.flatnonzero(mask)) for rows, mask in zip(parts, masks, strict=True)]


def _count(parts: Parts) -> int:
    return sum(len(rows) for rows in parts)


def _draw(parts: Parts, count: int, seed: int, name: str) -> tuple[Parts, Parts]:
    """`count` rows of all parts together, and the rest; parts of which nothing is drawn fall away."""
    available = _count(parts)
    if count > available or available == 0:
        raise DataError(f"the {name} needs {count} rows where {available} are left: ask for fewer, or give more data")
    purpose = ("test set", "target", "pool").index(name)
    chosen = np.zeros(available, dtype=bool)
    chosen[np.random.default_rng((SPLIT, seed, purpose)).permutation(available)[:count]] = True
    pieces = np.split(chosen, np.cumsum([len(rows) for rows in parts])[:-1])
    drawn, rest = (
        [rows.take(np.flatnonzero(mask == wanted)) for rows, mask in zip(parts, pieces, strict=True)]
        for wanted in (True, False)
    )
    return [rows for rows in drawn if len(rows)], [rows for rows in rest if len(rows)]
