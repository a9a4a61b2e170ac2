"""Which rows of prompt templates have the same content: a phrase in common that belongs to the row, not its template.

P3 writes one row of a data set in several templates, so that a row of the test set may stand in the pool in other
words. A phrase is what stands between marks of punctuation, normalised, without the words of the template.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

WORDS = re.compile(r"\w+")
MARKS = re.compile(r'[\n.:;?!"]+')
"""Ends of a phrase. Commas are none: lists of concepts are phrases."""
SPAN = 3
"""Words in a row that are looked for in the other rows of the template."""
OF_TEMPLATE = 0.25
"""Share of the rows of a template in which a span of words is the template's own."""
COMMON, LEAST = 0.06, 2
"""Share of the rows of a template, and number of rows, beyond which a whole phrase tells nothing of its row."""
SHORTEST_WORDS, SHORTEST = 3, 16
"""Words and characters of the shortest phrase that counts: shorter ones are the same by chance."""


def phrases(prompts: Sequence[str], responses: Sequence[str], templates: Sequence[str]) -> list[frozenset[str]]:
    """The phrases of each row that tell its content.

    Args:
        prompts, responses, templates: of each row, length n each.

    Returns:
        n sets; empty where all that a row says is short or common.
    """
    sizes = Counter(templates)
    parts = [[*_parts(prompt), *_parts(response)] for prompt, response in zip(prompts, responses, strict=True)]
    spans: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for template, row in zip(templates, parts, strict=True):
        spans[template].update({span for words in row for span in _spans(words)})
    own = {name: {s for s, n in counts.items() if n > OF_TEMPLATE * sizes[name]} for name, counts in spans.items()}
    rows = [
        {phrase for words in row for phrase in _without(words, own[name])}
        for name, row in zip(templates, parts, strict=True)
    ]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for template, row_phrases in zip(templates, rows, strict=True):
        counts[template].update(row_phrases)
    limits = {name: max(LEAST, COMMON * n) for name, n in sizes.items()}
    common = {phrase for name, count in counts.items() for phrase, n in count.items() if n > limits[name]}
    return [frozenset(row - common) for row in rows]


def content_groups(rows: Sequence[Collection[str]]) -> np.ndarray:
    """A number for each row, int64, shape (n,): the same for rows that share a phrase, also through others.

    Args:
        rows: the phrases of each, length n.
    """
    numbers: dict[str, int] = {}
    pairs = [(i, numbers.setdefault(phrase, len(numbers))) for i, row in enumerate(rows) for phrase in row]
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    size = len(rows) + len(numbers)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1] + len(rows))), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    return np.asarray(labels[: len(rows)], dtype=np.int64)


def _parts(text: str) -> list[list[str]]:
    return [WORDS.findall(part) for part in MARKS.split(text.casefold())]


def _spans(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + SPAN]) for i in range(len(words) - SPAN + 1))


def _without(words: Sequence[str], spans: Collection[tuple[str, ...]]) -> Iterator[str]:
    """What is left of the words between spans of the template."""
    covered = np.zeros(len(words) + 1, dtype=bool)
    covered[-1] = True
    for i, span in enumerate(_spans(words)):
        if span in spans:
            covered[i : i + SPAN] = True
    start = 0
    for end in np.flatnonzero(covered).tolist():
        phrase = " ".join(words[start:end])
        if end - start >= SHORTEST_WORDS and len(phrase) >= SHORTEST:
            yield phrase
        start = end + 1
