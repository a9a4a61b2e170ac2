"""BM25 of large pools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from baselines import bm25
from baselines.bm25 import Bm25
from baselines.similarity import okapi
from baselines.similarity.okapi import Okapi
from cads.accounting.ledger import Ledger


class TestBm25:
    def test_documents_that_are_read_again_score_the_same(self, monkeypatch):
        rng = np.random.default_rng(0)
        documents = [[f"w{w}" for w in rng.geometric(0.2, rng.integers(0, 9))] for _ in range(60)]
        chunks = [pa.array(documents[a : a + 13], pa.list_(pa.string())) for a in range(0, 60, 13)]
        stored = Okapi(chunks)
        monkeypatch.setattr(okapi, "KEPT", 20)
        streamed = Okapi(chunks)
        assert streamed._chunk_weights is None
        queries = [np.asarray(stored.count(pa.array([q])).sum(axis=0)) for q in (["w1", "w4"], ["w2"], ["none"])]
        assert (streamed.idf == stored.idf).all()
        assert (streamed.document_frequency == stored.document_frequency).all()
        assert streamed.n_postings == stored.n_postings
        assert (streamed.scores(*queries) == np.max([stored.scores(q) for q in queries], axis=0)).all()

    def test_texts_are_asked_for_chunk_by_chunk(self, texts, monkeypatch):
        task, sizes = texts(), []
        expected = Bm25().rank(task, seed=0, ledger=Ledger()).score
        monkeypatch.setattr(bm25, "CHUNK", 9)
        monkeypatch.setattr(okapi, "KEPT", 0)
        all_texts = task.texts
        task.texts = lambda pool: sizes.append(len(pool)) or all_texts(pool)
        assert (Bm25().rank(task, seed=0, ledger=Ledger()).score == expected).all()
        assert sorted(sizes)[-2] <= 9
        assert max(sizes) == len(task.target)
