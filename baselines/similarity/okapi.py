"""The Okapi formula (BM25) on counts of terms: documents in chunks, the idf of their terms, scores of queries.

Scores are linear in the counts of query terms. The counts are averaged first, so the mean over queries is one product.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from cads.errors import DataError

log = logging.getLogger(__name__)

K1, B, EPSILON = 1.5, 0.75, 0.25
"""`rank_bm25`'s defaults: saturation of the term frequency, length normalisation, floor of a negative idf."""
KEPT = 2**24
"""Maximum number of postings whose weights stay in memory: 200 MB. Beyond it, scoring reads the texts again."""
STAGE = "index and scores"

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


@dataclass(frozen=True)
class OkapiTerms:
    """What the formula knows of terms: with it, documents are scored wherever they are.

    Attributes:
        vocabulary: the terms that count, in alphabetical order, shape (V,). idf: of each, shape (V,).
        mean_size: words of a document on average. k1, b: parameters of the formula.
    """

    vocabulary: pa.Array
    idf: np.ndarray
    mean_size: float
    k1: float
    b: float

    def count(self, queries: pa.ListArray) -> csr_array:
        """How often each query holds each term of the vocabulary, shape (M, V); other terms are left out."""
        terms = pc.index_in(queries.flatten(), value_set=self.vocabulary)
        in_vocabulary = terms.is_valid().to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(queries)), np.diff(_offsets(queries)))[in_vocabulary]
        columns = terms.drop_null().to_numpy()
        shape = len(queries), len(self.vocabulary)
        return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)

    def weights(self, chunk: Chunk) -> csr_array:
        """The factor that the formula multiplies with idf, for each posting of the vocabulary, shape (n, V)."""
        counts = chunk.counts
        saturation = self.k1 * (1 - self.b + self.b * chunk.size / self.mean_size)
        frequency = counts.data.astype(np.float64)
        weight = np.repeat(saturation, np.diff(counts.indptr))
        weight += frequency
        np.divide(frequency, weight, out=weight)
        weight *= self.k1 + 1
        # A chunk's terms are in alphabetical order too, so the columns stay sorted.
        columns = pc.index_in(chunk.terms, value_set=self.vocabulary).to_numpy()
        return csr_array(
            (weight, columns[counts.indices], counts.indptr), shape=(counts.shape[0], len(self.vocabulary))
        )

    def best(self, weights: Iterable[csr_array], queries: Sequence[np.ndarray]) -> np.ndarray:
        """The best score of each document for the (mean) term counts of some queries, shape (V,) each; shape (N,)."""
        scaled = [self.idf * query for query in queries]
        return np.concatenate([_best(chunk_weights, scaled) for chunk_weights in weights])


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
        terms: the terms, with their inverse document frequency.
        n_postings: distinct terms of each document, summed over the documents.
    """

    def __init__(
        self, documents: Iterable[pa.ListArray], *, k1: float = K1, b: float = B, idf: Idf = floored_idf
    ) -> None:
        self._documents = documents
        self.n_postings = 0
        n, n_words = 0, 0
        terms, chunks = _TermCounts(), []
        for lists in documents:
            chunk = Chunk.of(lists)
            terms.add(chunk)
            n, n_words = n + len(chunk.size), n_words + int(chunk.size.sum())
            self.n_postings += chunk.counts.nnz
            chunks.append(chunk)
            if self.n_postings > KEPT:
                chunks.clear()
        # With terms in alphabetical order, sums are bit-identical for any order of the documents.
        vocabulary, self.document_frequency = terms.alphabetical()
        self.terms = OkapiTerms(vocabulary, idf(n, self.document_frequency), mean_size(n_words, n), k1, b)
        self._chunk_weights = [self.terms.weights(chunk) for chunk in chunks] if self.n_postings <= KEPT else None

    @property
    def idf(self) -> np.ndarray:
        """Inverse document frequency of each term, shape (V,)."""
        return self.terms.idf

    def count(self, queries: pa.ListArray) -> csr_array:
        """How often each query holds each term of the documents, shape (M, V); other terms are left out."""
        return self.terms.count(queries)

    def scores(self, *queries: np.ndarray) -> np.ndarray:
        """The score of each document for the (mean) term counts of a query, shape (V,); float64, shape (N,).

        For several queries, the best score of each document.
        """
        chunks = self._chunk_weights
        weights = chunks if chunks is not None else (self.terms.weights(Chunk.of(x)) for x in self._documents)
        return self.terms.best(weights, queries)

    def n_matches(self, query: np.ndarray) -> int:
        """Number of postings of the terms of a query (shape (V,))."""
        return int(self.document_frequency[query != 0].sum())


def mean_size(n_words: int, n: int) -> float:
    """Words of a document on average."""
    return max(n_words / n, 1.0 / n)


@dataclass(frozen=True)
class Chunk:
    """Some documents: their terms in alphabetical order, the counts (n, terms), and the words in each (n,)."""

    terms: pa.Array
    counts: csr_array
    size: np.ndarray

    @classmethod
    def of(cls, lists: pa.ListArray) -> Chunk:
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

    @property
    def document_frequency(self) -> np.ndarray:
        """The documents that hold each term, int64, shape (terms,)."""
        return np.bincount(self.counts.indices, minlength=len(self.terms)).astype(np.int64)

    def within(self, vocabulary: pa.Array) -> Chunk:
        """The same documents with the postings of some terms alone; their sizes stay."""
        known = pc.is_in(self.terms, value_set=vocabulary)
        columns = np.flatnonzero(known.to_numpy(zero_copy_only=False))
        return Chunk(self.terms.take(pa.array(columns)), self.counts[:, columns], self.size)


class _TermCounts:
    """The distinct terms of all chunks, and the number of documents that hold each."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._merged = 0

    def add(self, chunk: Chunk) -> None:
        """Add one chunk."""
        self._parts.append(pa.table({"term": chunk.terms, "documents": chunk.document_frequency}))
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


def say_unmatched(counts: csr_array) -> None:
    """Warn of target texts that share no word with the pool; counts: of its words in each, shape (M, V)."""
    n = counts.shape[0]
    n_unmatched = n - np.count_nonzero(np.diff(counts.indptr))
    if n_unmatched:
        effect = "all scores are zero" if n_unmatched == n else "they score every text with zero"
        log.warning("bm25: %d of %d target texts share no word with the pool: %s", n_unmatched, n, effect)


def _best(weights: csr_array, queries: Sequence[np.ndarray]) -> np.ndarray:
    """The best score of each row over the queries (each of shape (V,)), shape (n,)."""
    best = np.asarray(weights @ queries[0])
    for query in queries[1:]:
        np.maximum(best, weights @ query, out=best)
    return best


def _offsets(lists: pa.ListArray) -> np.ndarray:
    return np.asarray(lists.offsets.to_numpy(), dtype=np.int64)
