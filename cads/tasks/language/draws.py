"""Random draws of rows in which no source is lost, as far as that is possible."""

from __future__ import annotations

import logging

import numpy as np

log = logging.getLogger(__name__)

NAMED = 5
"""Sources that a message names."""


def first_of_each(order: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """The first `count` positions of `order`, with at least one of each source.

    Where the first `count` lack a source, its first row takes the place of the last row that can be spared. If there
    are more sources than `count`, they are the first `count` as they are.

    Args:
        order: a permutation of all positions, int64, shape (N,). codes: the source of each position, int, shape (N,).
    """
    _, firsts = np.unique(codes[order], return_index=True)
    if len(firsts) > count:
        return order[:count]
    return np.concatenate([order[firsts], np.delete(order, firsts)[: count - len(firsts)]])


def say_lost(before: set[str], after: set[str], split: str) -> None:
    """Warn of the sources of which no row is left."""
    lost = sorted(before - after)
    if lost:
        log.warning(
            "no row of %d of %d sources is left in the %s, such as %s: they are gone; draw fewer rows for the others, "
            "or give these sources more",
            len(lost),
            len(before),
            split,
            lost[:NAMED],
        )
