"""BM25 file by file: a survey counts in how many texts the words of the target are, and how long texts are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baselines.similarity.okapi import STAGE, Chunk, OkapiTerms, mean_size, positive_idf, say_unmatched
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.accounting.operations import bm25_flops
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.scoring.sharded import PoolPart, ShardedScoring, Values
from cads.task import Task

TEXTS, WORDS = "\0texts", "\0words"
"""Rows of a survey that are no words: the number of texts, and of words in them."""


class WordSettings(Protocol):
    """What is asked of `baselines.bm25.Bm25`: its parameters, and how it reads texts."""

    method: ClassVar[str]
    k1: float
    b: float

    @property
    def cut(self) -> Cut:
        """How its ranking is cut."""
        ...

    def split(self, texts: Sequence[str]) -> pa.ListArray:
        """The tokens of each text."""
        ...

    def documents(self, task: Task) -> Iterable[pa.ListArray]:
        """The texts of the pool as token lists, chunk by chunk."""
        ...

    def query_weights(self, task: Task) -> np.ndarray:
        """Weights that average the target's texts, shape (G, M)."""
        ...


class ShardedWords(ShardedScoring):
    """Scores by the positive idf of all files; they equal those of `Bm25.rank` on the whole pool bit by bit."""

    surveys = True

    def __init__(self, bm25: WordSettings, config: dict[str, Any]) -> None:
        super().__init__(bm25.method, config, bm25.cut)
        self._bm25 = bm25

    def survey(self, part: PoolPart, prepared: State, *, seed: int, ledger: Ledger) -> pa.Table:
        """Texts, words, and the texts that hold each word of the target. Counting is free."""
        terms = self._target_terms(part.task)
        frequency, n, n_words = np.zeros(len(terms), dtype=np.int64), 0, 0
        for lists in self._bm25.documents(part.task):
            chunk = Chunk.of(lists)
            n, n_words = n + len(chunk.size), n_words + int(chunk.size.sum())
            known = chunk.within(terms)
            frequency[pc.index_in(known.terms, value_set=terms).to_numpy()] += known.document_frequency
        return pa.table(
            {"term": pa.concat_arrays([pa.array([TEXTS, WORDS]), terms]), "count": np.r_[n, n_words, frequency]}
        )

    def combine(
        self, surveys: Iterable[pa.Table], task: Task, prepared: State, *, ledger: Ledger, **others: Any
    ) -> State:
        """The idf of the target's words that the pool has, and the mean size of a text."""
        totals = sum(table["count"].to_numpy() for table in surveys)
        (n, n_words), frequency = totals[:2].tolist(), totals[2:]
        terms = self._target_terms(task).filter(pa.array(frequency > 0))
        idf = positive_idf(n, frequency[frequency > 0])
        state = State({"terms": terms.to_pylist(), "idf": idf.tolist(), "mean_size": mean_size(n_words, n)})
        say_unmatched(self._terms(state).count(self._bm25.split(task.texts(task.target))))
        return state

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """See `ShardedScoring`."""
        terms = self._terms(state)
        counts = terms.count(self._bm25.split(task.texts(task.target)))
        queries = [counts.T @ row for row in self._bm25.query_weights(task)]
        used = np.array([query != 0 for query in queries])

        def values(part: Task, ledger: Ledger) -> np.ndarray:
            weights, n_postings, n_matches = [], 0, 0
            with ledger.timed(SELECT, STAGE):
                for lists in self._bm25.documents(part):
                    chunk = Chunk.of(lists)
                    n_postings += chunk.counts.nnz
                    weights.append(terms.weights(chunk.within(terms.vocabulary)))
                    in_texts = np.bincount(weights[-1].indices, minlength=len(terms.vocabulary))
                    n_matches += int((used * in_texts).sum())
                ledger.charge(SELECT, STAGE, bm25_flops(n_postings, n_matches))
                return terms.best(weights, queries)

        return values

    def plan(self, task: Task) -> PlannedLedger:
        """An upper bound: every token a posting that matches."""
        ledger = PlannedLedger()
        postings = task.costs.tokens_per_example(task.pool) * len(task.pool)
        ledger.charge(SELECT, STAGE, bm25_flops(postings, postings))
        return ledger

    def _target_terms(self, task: Task) -> pa.Array:
        """The words of the target, in alphabetical order."""
        words = self._bm25.split(task.texts(task.target)).flatten().unique()
        return words.take(pc.sort_indices(words))

    def _terms(self, state: State) -> OkapiTerms:
        values = state.values
        return OkapiTerms(
            pa.array(values["terms"], pa.string()),
            np.array(values["idf"], dtype=np.float64),
            float(values["mean_size"]),
            self._bm25.k1,
            self._bm25.b,
        )
