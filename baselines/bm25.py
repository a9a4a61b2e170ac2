"""BM25: scores the words that a text shares with the target, by the Okapi formula.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009. Their idf,
`ln((N - n + 1/2) / (n + 1/2))`, is negative for a term in more than half of the N documents, so that a copy of the
target can score below a text that shares no word with it. The idf here is that of Lucene, which is positive:
`ln(1 + (N - n + 1/2) / (n + 1/2))`. `recipe = paper` has the idf of `rank_bm25.BM25Okapi`, which CCDS uses: the first
formula with a floor, which is positive only if the mean idf is.

As a selector: CCDS (arXiv 2410.16208), whose mean over all queries is `aggregate = mean`. The default here is the best
of the subtasks' means, as in LESS.

Scores are linear in the counts of query terms. The counts are averaged first, so the mean over queries is one product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from baselines.similarity.queries import mean_weights, subtask_weights
from baselines.similarity.words import split_words, tokenize
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.operations import bm25_flops
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.stages import Priced
from cads.task import Task
from cads.tasks.shape_only import ShapeOnly

log = logging.getLogger(__name__)

K1, B, EPSILON = 1.5, 0.75, 0.25
"""`rank_bm25`'s defaults: saturation of the term frequency, length normalisation, floor of a negative idf."""
CHUNK, CHUNK_CHARACTERS = 2**16, 2**26
"""Texts, and characters in them, whose tokens are in memory as strings at once. Each character may begin a pair, of up
to eight bytes: with the words, 1 GB of the 2 GB that an Arrow string array holds."""
KEPT = 2**24
"""Maximum number of postings whose weights stay in memory: 200 MB. Beyond it, scoring reads the texts again."""
STAGE = "index and scores"

Recipe = Literal["cads", "paper"]
Idf = Callable[[int, np.ndarray], np.ndarray]
"""(N, the documents that hold each term (V,)) -> the inverse document frequency of each term (V,)."""


def positive_idf(n: int, document_frequency: np.ndarray) -> np.ndarray:
    """`ln(1 + (N - n + 1/2) / (n + 1/2))` for terms in n of N documents, shape (V,): Lucene's `BM25Similarity`."""
    return np.asarray(np.log1p((n - document_frequency + 0.5) / (document_frequency + 0.5)))


def floored_idf(n: int, document_frequency: np.ndarray, *, epsilon: float = EPSILON) -> np.ndarray:
    """The idf of `rank_bm25.BM25Okapi`: where it is below 0 it becomes `epsilon` times the mean idf, shape (V,).

    The mean may be negative too.
    """
    idf = np.log(n - document_frequency + 0.5) - np.log(document_frequency + 0.5)
    return np.where(idf < 0, epsilon * (idf.mean() if len(idf) else 0.0), idf)


class Okapi:
    """Documents as rows of term counts, with the formula's weights.

    With up to `KEPT` postings, their weights stay in memory. With more, only the statistics of the terms do, and every
    scoring reads the documents again: memory then holds the vocabulary and one chunk.

    Args:
        documents: token lists, chunk by chunk (`pa.ListArray` of strings); iterated again for every scoring if there
            are more than `KEPT` postings.
        k1, b: parameters of the formula. idf: the weights of terms.

    Attributes:
        document_frequency: number of documents that hold each term, int64, shape (V,).
        idf: inverse document frequency of each term, shape (V,).
        n_postings: distinct terms of each document, summed over the documents.
    """

    def __init__(
        self, documents: Iterable[pa.ListArray], *, k1: float = K1, b: float = B, idf: Idf = floored_idf
    ) -> None:
        self._documents, self._k1, self._b = documents, k1, b
        self.n_postings = 0
        n, n_words = 0, 0
        terms, chunks = _TermCounts(), []
        for lists in documents:
            chunk = _Chunk.of(lists)
            terms.add(chunk)
            n, n_words = n + len(chunk.size), n_words + int(chunk.size.sum())
            self.n_postings += chunk.counts.nnz
            chunks.append(chunk)
            if self.n_postings > KEPT:
                chunks.clear()
        # With terms in alphabetical order, sums are bit-identical for any order of the documents.
        self._vocabulary, self.document_frequency = terms.alphabetical()
        self.idf = idf(n, self.document_frequency)
        self._mean_size = max(n_words / n, 1.0 / n)
        self._chunk_weights = [self._weights(chunk) for chunk in chunks] if self.n_postings <= KEPT else None

    def count(self, queries: pa.ListArray) -> csr_array:
        """How often each query holds each term of the documents, shape (M, V); other terms are left out."""
        terms = pc.index_in(queries.flatten(), value_set=self._vocabulary)
        in_vocabulary = terms.is_valid().to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(queries)), np.diff(_offsets(queries)))[in_vocabulary]
        columns = terms.drop_null().to_numpy()
        shape = len(queries), len(self._vocabulary)
        return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)

    def scores(self, *queries: np.ndarray) -> np.ndarray:
        """The score of each document for the (mean) term counts of a query, shape (V,); float64, shape (N,).

        For several queries, the best score of each document.
        """
        scaled = [self.idf * query for query in queries]
        chunk_weights = self._chunk_weights
        chunks = chunk_weights if chunk_weights is not None else (self._weights(_Chunk.of(x)) for x in self._documents)
        return np.concatenate([_best(weights, scaled) for weights in chunks])

    def n_matches(self, query: np.ndarray) -> int:
        """Number of postings of the terms of a query (shape (V,))."""
        return int(self.document_frequency[query != 0].sum())

    def _weights(self, chunk: _Chunk) -> csr_array:
        """The factor that the formula multiplies with idf, for each posting, shape (n, V)."""
        counts = chunk.counts
        saturation = self._k1 * (1 - self._b + self._b * chunk.size / self._mean_size)
        frequency = counts.data.astype(np.float64)
        weight = np.repeat(saturation, np.diff(counts.indptr))
        weight += frequency
        np.divide(frequency, weight, out=weight)
        weight *= self._k1 + 1
        # A chunk's terms are in alphabetical order too, so the columns stay sorted.
        columns = pc.index_in(chunk.terms, value_set=self._vocabulary).to_numpy()
        return csr_array(
            (weight, columns[counts.indices], counts.indptr), shape=(counts.shape[0], len(self._vocabulary))
        )


@dataclass(frozen=True)
class _Chunk:
    """Some documents: their terms in alphabetical order, the counts (n, terms), and the words in each (n,)."""

    terms: pa.Array
    counts: csr_array
    size: np.ndarray

    @classmethod
    def of(cls, lists: pa.ListArray) -> _Chunk:
        """Count the terms of token lists."""
        coded = pc.dictionary_encode(lists.flatten())
        order = pc.sort_indices(coded.dictionary)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
        size = np.diff(_offsets(lists))
        ends = np.concatenate([[0], np.cumsum(size)])
        columns = rank[coded.indices.to_numpy()]
        index_type = np.int32 if len(columns) < 2**31 else np.int64
        # float32 is exact for integers up to 2^24, at half the memory of float64.
        counts = csr_array(
            (np.ones(len(columns), dtype=np.float32), columns.astype(index_type, copy=False), ends.astype(index_type)),
            shape=(len(size), len(order)),
        )
        counts.sum_duplicates()
        return cls(coded.dictionary.take(order), counts, size)


class _TermCounts:
    """The distinct terms of all chunks, and the number of documents that hold each."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._merged = 0

    def add(self, chunk: _Chunk) -> None:
        """Add one chunk."""
        document_frequency = np.bincount(chunk.counts.indices, minlength=len(chunk.terms)).astype(np.int64)
        self._parts.append(pa.table({"term": chunk.terms, "documents": document_frequency}))
        # Merging only when the table has doubled keeps the number of merges logarithmic, not one per chunk.
        if sum(map(len, self._parts)) > 2 * self._merged:
            self._merge()

    def alphabetical(self) -> tuple[pa.Array, np.ndarray]:
        """The terms in alphabetical order, and the number of documents that hold each, int64, shape (V,)."""
        self._merge()
        table = self._parts[0].sort_by("term").combine_chunks()
        return table["term"].combine_chunks(), table["documents"].to_numpy()

    def _merge(self) -> None:
        grouped = pa.concat_tables(self._parts).group_by("term", use_threads=False).aggregate([("documents", "sum")])
        self._parts = [grouped.rename_columns({"documents_sum": "documents"})]
        self._merged = len(grouped)


def okapi_scores(documents: Sequence[Sequence[str]], queries: Sequence[Sequence[str]]) -> np.ndarray:
    """The mean over `queries` of the BM25 score of each document, as `rank_bm25.BM25Okapi` scores, shape (N,).

    Args:
        documents, queries: lists of tokens. A token that a query repeats counts again.

    Raises:
        DataError: if there are no documents or no queries, or they are not lists of tokens.
    """
    for name, texts in (("documents", documents), ("queries", queries)):
        if not len(texts):
            raise DataError(f"{name} is empty: BM25 needs at least one")
        if any(isinstance(text, str) for text in texts):
            raise DataError(f"{name} has texts that are strings: split them into tokens")
    try:
        document_lists = pa.array(documents, pa.list_(pa.string()))
        query_lists = pa.array(queries, pa.list_(pa.string()))
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"documents and queries must be lists of tokens that are strings: {error}") from error
    for name, lists in (("documents", document_lists), ("queries", query_lists)):
        if lists.null_count or lists.flatten().null_count:
            raise DataError(f"{name} has tokens, or lists of them, that are None: leave them out")
    okapi = Okapi([document_lists])
    return okapi.scores(np.asarray(okapi.count(query_lists).mean(axis=0)))


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

    def _split(self, texts: Sequence[str]) -> pa.ListArray:
        """The tokens of each text."""
        return tokenize(texts) if self.recipe == "cads" else split_words(texts)

    def _indexed(self, task: Task) -> tuple[Okapi, np.ndarray]:
        """The index of the pool and the mean query of each subtask, (G, V); cached between the plan and the ranking."""
        if self._cached is None or self._cached[0] is not task:
            queries = self._split(task.texts(task.target))
            idf = positive_idf if self.recipe == "cads" else partial(floored_idf, epsilon=self.epsilon)
            okapi = Okapi(_TokenizedTexts(task, task.pool, self._split), k1=self.k1, b=self.b, idf=idf)
            counts = okapi.count(queries)
            n_unmatched = len(queries) - np.count_nonzero(np.diff(counts.indptr))
            if n_unmatched:
                effect = "all scores are zero" if n_unmatched == len(queries) else "they score every text with zero"
                log.warning(
                    "bm25: %d of %d target texts share no word with the pool: %s", n_unmatched, len(queries), effect
                )
            weights = subtask_weights(task) if self.aggregate == "subtask" else mean_weights(task)
            self._cached = task, okapi, np.stack([counts.T @ row for row in weights])
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


def _best(weights: csr_array, queries: Sequence[np.ndarray]) -> np.ndarray:
    """The best score of each row over the queries (each of shape (V,)), shape (n,)."""
    best = np.asarray(weights @ queries[0])
    for query in queries[1:]:
        np.maximum(best, weights @ query, out=best)
    return best


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return np.asarray(lists.offsets.to_numpy(), dtype=np.int64)
