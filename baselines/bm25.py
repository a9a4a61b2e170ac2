"""BM25: scores the words that a text shares with the target, by the Okapi formula.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009. Their idf,
`ln((N - n + 1/2) / (n + 1/2))`, is negative for a term in more than half of the N documents, so that a copy of the
target can score below a text that shares no word with it. The idf here is that of Lucene, which is positive:
`ln(1 + (N - n + 1/2) / (n + 1/2))`. `recipe = paper` has the idf of `rank_bm25.BM25Okapi`, which CCDS uses: the first
formula with a floor, which is positive only if the mean idf is.

As a selector: CCDS (arXiv 2410.16208), whose mean over all queries is `aggregate = mean`. The default here is the best
of the subtasks' means, as in LESS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa

from baselines.similarity.okapi import (
    EPSILON,
    K1,
    STAGE,
    B,
    Okapi,
    floored_idf,
    positive_idf,
    say_unmatched,
)
from baselines.similarity.queries import mean_weights, subtask_weights
from baselines.similarity.words import split_words, tokenize
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.operations import bm25_flops
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.scoring.stages import Priced
from cads.task import Task
from cads.tasks.shape_only import ShapeOnly

CHUNK, CHUNK_CHARACTERS = 2**16, 2**26
"""Texts, and characters in them, whose tokens are in memory as strings at once. Each character may begin a pair, of up
to eight bytes: with the words, 1 GB of the 2 GB that an Arrow string array holds."""

Recipe = Literal["cads", "paper"]


@dataclass
class Bm25(Ranker):
    """Okapi BM25 of each text of the pool against the texts of the target: the task's texts, never the answers."""

    k1: float = K1
    """Saturation of the term frequency: the larger, the more repeated words count."""
    b: float = B
    """Length normalisation: 0 none, 1 in full proportion to the length of the text."""
    recipe: Recipe = "cads"
    """cads: an idf that is never negative (Lucene's), and pairs of characters for scripts without spaces, such as
    Chinese. paper: idf and words as with `rank_bm25`, where words in more than half of the texts may count against a
    text."""
    epsilon: float = EPSILON
    """With recipe = paper, a negative idf (a word in more than half of the texts) becomes this share of the mean
    idf."""
    aggregate: Literal["subtask", "mean"] = "subtask"
    """Over the target: the best of the subtasks' means, or the mean of all (CCDS). They agree without subtasks."""

    method: ClassVar[str] = "bm25"
    reads_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k1 >= 0:
            raise ConfigError(f"k1 = {self.k1}: it must be >= 0")
        if not 0 <= self.b <= 1:
            raise ConfigError(f"b = {self.b}: it must lie between 0 and 1")
        if self.recipe not in get_args(Recipe):
            raise ConfigError(f"recipe = {self.recipe!r}: choose from {list(get_args(Recipe))}")
        if not 0 <= self.epsilon < float("inf"):
            raise ConfigError(f"epsilon = {self.epsilon}: it must be >= 0")
        if self.recipe == "cads" and self.epsilon != EPSILON:
            raise ConfigError(
                f"epsilon = {self.epsilon} has no effect, since no idf is negative: leave it out, or set recipe = paper"
            )
        if self.aggregate not in get_args(Literal["subtask", "mean"]):
            raise ConfigError(f"aggregate = {self.aggregate!r}: choose subtask or mean")
        self._cached: tuple[Task, Okapi, np.ndarray] | None = None

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Index the pool, count the query terms, multiply; see `cads.scoring.ranker.Ranker`."""
        with ledger.timed(SELECT, STAGE):
            okapi, queries = self._indexed(task)
            for stage in self.stages(task):
                stage.charge(task, ledger)
            score = okapi.scores(*queries)
        self._cached = None
        return self.ranking(task, score, seed=seed, ledger=ledger)

    def stages(self, scorer: Task) -> tuple[Priced]:
        """Exact if the pool has texts, since counting words is free; see `cads.scoring.ranker.Ranker`."""
        if isinstance(scorer.pool.examples, ShapeOnly):
            scorer.texts(scorer.pool.subset(np.zeros(1, dtype=np.int64), "pool"))
            postings = scorer.costs.tokens_per_example(scorer.pool) * len(scorer.pool)
            return (Priced(STAGE, bm25_flops(postings, postings)),)
        okapi, queries = self._indexed(scorer)
        n_matches = sum(okapi.n_matches(query) for query in queries)
        return (Priced(STAGE, bm25_flops(okapi.n_postings, n_matches)),)

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.words import ShardedWords

        if self.recipe != "cads":
            raise not_sharded(self.method, "the idf of recipe = paper needs every word of the pool; use recipe = cads")
        return ShardedWords(self, asdict(self))

    def query_weights(self, task: Task) -> np.ndarray:
        """Weights that average the target's texts, shape (G, M)."""
        return subtask_weights(task) if self.aggregate == "subtask" else mean_weights(task)

    def documents(self, task: Task) -> Iterable[pa.ListArray]:
        """The texts of the pool as token lists, chunk by chunk, which can be iterated repeatedly."""
        return _TokenizedTexts(task, task.pool, self.split)

    def split(self, texts: Sequence[str]) -> pa.ListArray:
        """The tokens of each text."""
        return tokenize(texts) if self.recipe == "cads" else split_words(texts)

    def _indexed(self, task: Task) -> tuple[Okapi, np.ndarray]:
        """The index of the pool and the mean query of each subtask, (G, V); cached between the plan and the ranking."""
        if self._cached is None or self._cached[0] is not task:
            queries = self.split(task.texts(task.target))
            idf = positive_idf if self.recipe == "cads" else partial(floored_idf, epsilon=self.epsilon)
            okapi = Okapi(self.documents(task), k1=self.k1, b=self.b, idf=idf)
            counts = okapi.count(queries)
            say_unmatched(counts)
            self._cached = task, okapi, np.stack([counts.T @ row for row in self.query_weights(task)])
        return self._cached[1:]


class _TokenizedTexts:
    """The texts of a pool as token lists, which can be iterated repeatedly; only one chunk of them is in memory."""

    def __init__(self, task: Task, pool: Pool, split: Callable[[Sequence[str]], pa.ListArray]) -> None:
        self._task, self._pool, self._split = task, pool, split

    def __iter__(self) -> Iterator[pa.ListArray]:
        n = len(self._pool)
        for start in range(0, n, CHUNK):
            rows = np.arange(start, min(start + CHUNK, n))
            part = self._pool if n <= CHUNK else self._pool.subset(rows, self._pool.name)
            texts = self._task.texts(part)
            characters = np.cumsum([len(text) for text in texts])
            # Texts that end within the same multiple of CHUNK_CHARACTERS: a group exceeds it by one text at most.
            cuts = np.flatnonzero(np.diff(characters // CHUNK_CHARACTERS)) + 1
            for first, last in pairwise([0, *cuts.tolist(), len(texts)]):
                yield self._split(texts[first:last])
