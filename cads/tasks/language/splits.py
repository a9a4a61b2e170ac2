"""Pool, target and test set from text sources; rows are divided, so that the split does not depend on a tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.ids import id_order
from cads.data.origin import join_origins
from cads.data.pool import Pool
from cads.errors import DataError
from cads.task import NO_TARGET, TEST_OF_POOL, TEST_OF_TARGET
from cads.tasks.language.draws import first_of_each, say_lost
from cads.tasks.language.encoding import EncodingReport, TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows, TextSource, labels_of, load_rows, repeated_ids, source_codes
from cads.tasks.language.source_names import names_and_prefixes
from cads.tasks.language.token_cache import TokenCache
from cads.tasks.language.tokens import Collected, Sequences

if TYPE_CHECKING:
    from cads.tasks.language.settings import LanguageSettings

log = logging.getLogger(__name__)

SPLIT = 6
"""First word of the seeds that divide the rows."""

Parts = list[Rows]
"""Rows of several sources, one after another."""
Encode = Callable[[Parts], tuple[Sequences, list[EncodingReport]]]
"""Encodes rows, or reads their tokens from the cache; returns the report on the rows of each source too."""


@dataclass(frozen=True)
class Split:
    """The rows of pool, target and test set.

    Attributes:
        named: whether each entry of the pool is a source.
    """

    pool: Parts
    target: Parts
    test: Parts
    named: bool

    def kept_by(self, pool: Pool, target: Pool) -> Split:
        """The split with only those rows of pool and target that are in `pool` and `target`."""
        return replace(self, pool=_among(self.pool, pool.ids), target=_among(self.target, target.ids))


def split_rows(
    pool: Sequence[TextSource],
    target: Sequence[TextSource],
    test: Sequence[TextSource],
    sizes: tuple[int | None, int | None, int | None],
    seed: int,
) -> Split:
    """Load the rows and divide them.

    If `target` is empty, the target is drawn from the pool's rows. If `test` is empty, the test set is drawn from the
    target's rows if there are any, else from the pool's.

    Args:
        sizes: n_pool, n_target, n_test; None for the defaults of `LanguageConfig`.
        seed: of every draw. Rows are drawn by their ids: files in another order of rows give the same examples.

    Every source keeps a row where it stays, or a warning names it.

    Raises:
        DataError: if there are fewer rows than requested, or an id is in two files.
    """
    n_pool, n_target, n_test = sizes
    single_entry = len(pool) == 1
    candidates, targets, tests = _load(pool, target, test, seed)
    given_pool, given_target = labels_of(candidates), labels_of(targets)
    if not tests:
        tests, rest = _drawn_test(targets or candidates, n_test, seed, "target" if targets else "pool")
        targets, candidates = (rest, candidates) if targets else (targets, rest)
    elif n_test is not None:
        tests = _reduce(tests, n_test, seed, "test set")
    if not targets:
        count = n_target if n_target is not None else max(1, _count(candidates) // 10)
        targets, candidates = _draw_out(candidates, count, seed, "target")
        log.info(NO_TARGET, f"{_count(targets):,}")
    elif n_target is not None:
        targets = _reduce(targets, n_target, seed, "target")
    if n_pool is not None:
        candidates = _reduce(candidates, n_pool, seed, "pool")
    if not candidates:
        raise DataError("no row is left for the pool: give more rows, or ask for a smaller n_target and n_test")
    say_lost(given_pool, labels_of(candidates), "pool")
    say_lost(given_target, labels_of(targets), "target")
    return Split(candidates, targets, tests, named=not single_entry)


def split_held_out(
    target: Sequence[TextSource], test: Sequence[TextSource], n_target: int | None, n_test: int | None, seed: int
) -> tuple[Parts, Parts]:
    """The rows of target and test set, as `split_rows` gives them where the target is not drawn from the pool.

    Raises:
        DataError: as `split_rows`.
    """
    _, targets, tests = _load([], target, test, seed)
    given = labels_of(targets)
    if not tests:
        tests, targets = _drawn_test(targets, n_test, seed, "target")
    elif n_test is not None:
        tests = _reduce(tests, n_test, seed, "test set")
    if n_target is not None:
        targets = _reduce(targets, n_target, seed, "target")
    say_lost(given, labels_of(targets), "target")
    return targets, tests


def encode_pools(
    split: Split, tokenizer: Any, settings: LanguageSettings, max_length: int
) -> tuple[list[Pool], dict[str, Any]]:
    """The rows as pools of `Tokens`, in memory or mapped.

    Args:
        settings: how examples are written, and where their tokens are stored.
        max_length: tokens at which examples are cut.

    Returns:
        pool, target and test set; and the numbers of examples cut and left out of each source, as JSON values.

    Raises:
        ConfigError: if the tokenizer lacks a chat template that is needed, or token_cache is not a folder.
        DataError: if an example cannot be encoded, or tokens cannot be written.
    """
    encoder = encoder_of(tokenizer, settings, max_length)
    encode: Encode = partial(_in_memory, encoder)
    if settings.token_cache is not None:
        cache = TokenCache(settings.token_cache, encoder)
        cache.sweep()
        encode = cache.fetch
    pools = [
        _pool(split.pool, encoder, encode, "pool", with_sources=True, named=split.named),
        _pool(split.target, encoder, encode, "target"),
        _pool(split.test, encoder, encode, "test set"),
    ]
    return [pool for pool, _ in pools], {"max_tokens": max_length, **{pool.name: counts for pool, counts in pools}}


def encoder_of(tokenizer: Any, settings: LanguageSettings, max_length: int) -> TokenEncoder:
    """What turns rows into tokens, for settings of a task.

    Raises:
        ConfigError: if the tokenizer lacks a chat template that is needed.
    """
    renderer = Renderer(tokenizer, settings.separator, settings.chat)
    return TokenEncoder(tokenizer, renderer, max_length, settings.packing, settings.drop)


def _in_memory(encoder: TokenEncoder, parts: Parts) -> tuple[Sequences, list[EncodingReport]]:
    collected = Collected()
    reports = [encoder.encode_into(rows, collected) for rows in parts]
    return collected.sequences(), reports


def _pool(
    parts: Parts,
    encoder: TokenEncoder,
    encode: Encode,
    name: str,
    *,
    with_sources: bool = False,
    named: bool = False,
) -> tuple[Pool, list[dict[str, Any]]]:
    sequences, reports = encode(parts)
    counts = [{"source": rows.name, **report.counts} for rows, report in zip(parts, reports, strict=True)]
    encoded = [
        rows.take(report.positions) if len(report.left_out) else rows
        for rows, report in zip(parts, reports, strict=True)
    ]
    ids = pa.concat_arrays([rows.ids for rows in encoded])
    tokens = encoder.tokens(sequences, _subtasks(encoded, name))
    say_lost(labels_of(parts), labels_of(encoded), f"encoded {name}")
    origin = join_origins([(rows.origin, rows.file_rows) for rows in encoded])
    if not with_sources or not (named or encoded[0].sources is not None):
        return Pool(ids, tokens, name=name, origin=origin), counts
    # An entry with a source column has several sources; any other entry is one source.
    labels = pa.concat_arrays([x.sources if x.sources is not None else _repeated(x.name, len(x)) for x in encoded])
    coded = labels.dictionary_encode()
    return Pool(ids, tokens, coded.indices.to_numpy(), coded.dictionary.to_pylist(), name=name, origin=origin), counts


def _subtasks(parts: Parts, name: str) -> np.ndarray | None:
    has_subtasks = [rows.subtasks is not None for rows in parts]
    if not any(has_subtasks):
        return None
    if not all(has_subtasks):
        raise DataError(f"only some sources of the {name} have a subtask column: name one for each, or for none")
    labels = pa.concat_arrays([rows.subtasks for rows in parts])
    codes: np.ndarray = pc.dictionary_encode(labels).indices.to_numpy().astype(np.int64)
    return codes


def _repeated(name: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(name, pa.string()), count)


def _among(parts: Parts, ids: pa.Array) -> Parts:
    """The rows with these ids, each of which must be an id of a row."""
    if _count(parts) == len(ids):
        return parts
    masks = [pc.is_in(rows.ids, value_set=ids).to_numpy(zero_copy_only=False) for rows in parts]
    return [rows.take(np.flatnonzero(mask)) for rows, mask in zip(parts, masks, strict=True)]


def _count(parts: Parts) -> int:
    return sum(len(rows) for rows in parts)


def _load(
    pool: Sequence[TextSource], target: Sequence[TextSource], test: Sequence[TextSource], seed: int
) -> tuple[Parts, Parts, Parts]:
    """The rows of all files, of which no two share an id."""
    given = [*pool, *target, *test]
    roles = ["pool"] * len(pool) + ["target"] * len(target) + ["test set"] * len(test)
    loaded = []
    for i, (name, prefix) in enumerate(names_and_prefixes(given)):
        given_sources = roles[i] == "pool" and len(pool) == 1
        loaded.append(load_rows(replace(given[i], name=name), seed, given_sources=given_sources, prefix=prefix))
    _check_ids(loaded, [f"the {role} ({source.location})" for role, source in zip(roles, given, strict=True)])
    first, second = len(pool), len(pool) + len(target)
    return loaded[:first], loaded[first:second], loaded[second:]


def _check_ids(parts: Parts, places: Sequence[str]) -> None:
    """Refuse an id that is in two files, also where neither row is drawn: one id stands for one example."""
    if len(parts) < 2:
        return
    repeated = repeated_ids(pa.chunked_array([rows.ids for rows in parts]))
    if repeated:
        holds = [pc.index(rows.ids, repeated[0]).as_py() >= 0 for rows in parts]
        of_first = [place for place, is_in in zip(places, holds, strict=True) if is_in]
        raise DataError(
            f"{len(repeated)} ids are in more than one file, such as {repeated[:3]}, in {' and '.join(of_first)}: "
            "give each file once; put the name of the file before its ids, or remove the columns of ids, so that rows "
            "are numbered"
        )


def _drawn_test(parts: Parts, n_test: int | None, seed: int, name: str) -> tuple[Parts, Parts]:
    """A test set drawn from the rows of the target or of the pool, and the rest of them.

    Raises:
        DataError: if no row is left.
    """
    available = _count(parts)
    count = n_test if n_test is not None else max(1, available // (2 if name == "target" else 5))
    tests, rest = _draw_out(parts, count, seed, "test set")
    if not rest:
        raise DataError(
            f"the test set takes all {available} rows of the {name}: give more rows, ask for a smaller n_test, or give "
            "a test set"
        )
    if name == "target":
        log.info(TEST_OF_TARGET, f"{count:,}", f"{available:,}")
    else:
        log.info(TEST_OF_POOL, f"{count:,}")
    return tests, rest


def _draw_out(parts: Parts, count: int, seed: int, name: str) -> tuple[Parts, Parts]:
    """`count` rows drawn from all parts together, and the rest, in which each source keeps a row if it can."""
    order, codes = _order(parts, count, seed, name)
    undrawn = first_of_each(order[::-1], codes, len(order) - count)
    is_drawn = np.ones(len(order), dtype=bool)
    is_drawn[undrawn] = False
    return _masked(parts, is_drawn), _masked(parts, ~is_drawn)


def _reduce(parts: Parts, count: int, seed: int, name: str) -> Parts:
    """`count` rows drawn from all parts together, among them one of each source if they suffice."""
    order, codes = _order(parts, count, seed, name)
    is_drawn = np.zeros(len(order), dtype=bool)
    is_drawn[first_of_each(order, codes, count)] = True
    return _masked(parts, is_drawn)


def _order(parts: Parts, count: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all parts in random order, and the source of each.

    The order permutes the rows of each part as their ids sort them, so that it does not depend on how files do. Rows
    that are numbered are in that order already.
    """
    available = _count(parts)
    if count > available or available == 0:
        raise DataError(f"the {name} needs {count} rows where {available} are left: ask for fewer, or give more data")
    purpose = ("test set", "target", "pool").index(name)
    starts = np.cumsum([0, *(len(rows) for rows in parts)])
    by_id = np.concatenate([start + id_order(rows.ids) for start, rows in zip(starts, parts, strict=False)])
    return by_id[np.random.default_rng((SPLIT, seed, purpose)).permutation(available)], source_codes(parts)[0]


def _masked(parts: Parts, mask: np.ndarray) -> Parts:
    """The rows of all parts for which `mask` holds, without parts that have none."""
    pieces = np.split(mask, np.cumsum([len(rows) for rows in parts])[:-1])
    return [rows.take(np.flatnonzero(piece)) for rows, piece in zip(parts, pieces, strict=True) if piece.any()]
