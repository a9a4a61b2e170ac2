"""The sources of a Selection as parts of a mixture: their shares, and how often each of their rows comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cads.data.streams import WeightedStream
from cads.exports.chosen_rows import ChosenRows
from cads.seeding import derive
from cads.selection import Selection

ONE_PART = "chosen"
"""Name of the only part, if the pool had no sources."""
TOLERANCE = 1e-9
"""Relative difference of shares that rounding explains."""
UNSAFE = re.compile(r"[^\w.-]+")
"""What neither the name of a file nor a list of names separated by commas should hold."""


@dataclass(frozen=True)
class MixturePart:
    """One source.

    Attributes:
        name: of the source. key: the name, fit for files and lists.
        share: of it in what training draws from the exported rows.
        examples: positions in the Selection, int64, shape (n,), in a random order; repeated as often as each comes.
    """

    name: str
    key: str
    share: float
    examples: np.ndarray


@dataclass(frozen=True)
class Mixture:
    """The parts that are exported, in the order of their names.

    Attributes:
        parts: those with a row.
        concatenated: whether the parts, one after another, have the shares that they should have.
    """

    parts: Sequence[MixturePart]
    concatenated: bool


def mixture_by_rows(chosen: ChosenRows, counts: np.ndarray, seed: int) -> Mixture:
    """Parts of which one after another are what training draws: each row comes as often as `counts` says.

    Args:
        counts: int64, shape (N,).
    """
    return _mixture(chosen, counts, seed, by_rows=True)


def mixture_by_share(chosen: ChosenRows, seed: int, *, weighted: bool) -> Mixture:
    """Parts that are to be mixed by their shares.

    Args:
        weighted: draw the rows of each part by their weights, as many as are selected of it; otherwise each comes once.
    """
    selection = chosen.selection
    counts = (chosen.counts > 0).astype(np.int64)
    if weighted:
        for name, members in _sources(selection, counts > 0):
            weights = selection.weights[members]
            if not np.allclose(weights, weights[0], rtol=TOLERANCE, atol=0):
                draws = WeightedStream(weights, derive(seed, "export", name)).take(0, len(members))
                counts[members] = np.bincount(draws, minlength=len(members))
    return _mixture(chosen, counts, seed, by_rows=False)


def unequal_within(chosen: ChosenRows) -> list[str]:
    """The sources whose chosen rows have different weights."""
    weights = chosen.selection.weights
    return [
        name
        for name, members in _sources(chosen.selection, chosen.counts > 0)
        if not np.allclose(weights[members], weights[members][0], rtol=TOLERANCE, atol=0)
    ]


def _mixture(chosen: ChosenRows, counts: np.ndarray, seed: int, *, by_rows: bool) -> Mixture:
    selection = chosen.selection
    present = np.isin(chosen.origin.file, [file.index for file in chosen.files])
    total = float(selection.weights[present & (chosen.counts > 0)].sum())
    parts: list[MixturePart] = []
    keys: set[str] = set()
    for name, members in _sources(selection, present & (chosen.counts > 0)):
        drawn = np.repeat(members, counts[members])
        if len(drawn):
            order = np.random.default_rng(derive(seed, "export order", name)).permutation(len(drawn))
            key = _key(name, keys)
            parts.append(MixturePart(name, key, float(selection.weights[members].sum()) / total, drawn[order]))
    shares = np.array([part.share for part in parts])
    sizes = np.array([len(part.examples) for part in parts], dtype=np.float64)
    in_proportion = np.allclose(sizes / sizes.sum(), shares, rtol=TOLERANCE, atol=0)
    return Mixture(parts, by_rows or bool(in_proportion))


def _sources(selection: Selection, chosen: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each source with a chosen example (bool, shape (N,)), by name, and their positions."""
    if selection.sources is None:
        return [(ONE_PART, np.flatnonzero(chosen))] if chosen.any() else []
    names, codes = selection.sources.dictionary.to_pylist(), selection.sources.indices.to_numpy()
    parts = [(str(name), np.flatnonzero(chosen & (codes == i))) for i, name in enumerate(names)]
    return sorted(((name, members) for name, members in parts if len(members)), key=lambda part: part[0])


def _key(name: str, taken: set[str]) -> str:
    """A name without what files and lists do not take; names that become equal are numbered."""
    plain = UNSAFE.sub("_", name).strip("._") or "source"
    key, number = plain, 1
    while key.lower() in taken:
        number += 1
        key = f"{plain}-{number}"
    taken.add(key.lower())
    return key
