"""Diversity: groups of alike examples are found, take turns, and do not depend on the order of the pool."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from baselines.embedding import Embedding
from baselines.similarity.clusters import cluster_centres, cluster_sample, nearest_centre, take_turns
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.operations import similarity_flops


def blobs(n=40, groups=4, width=3, spread=0.01):
    """Vectors around as many corners, and which one each is near."""
    rng = np.random.default_rng(0)
    corner = rng.integers(0, groups, n)
    return np.eye(groups, width + groups)[corner] + rng.normal(0, spread, (n, width + groups)), corner


def test_centres_are_those_of_well_separated_groups():
    vectors, corner = blobs()
    centres = cluster_centres(vectors, 4, seed=3)
    result = nearest_centre(torch.from_numpy(vectors), torch.from_numpy(centres)).numpy()
    assert len(set(zip(corner, result, strict=True))) == len(centres) == 4
    for group in np.unique(corner):
        assert np.abs(centres - vectors[corner == group].mean(axis=0)).sum(axis=1).min() < 1e-9


def test_the_nearest_centre_is_that_of_a_plain_loop():
    rng = np.random.default_rng(1)
    vectors, centres = rng.normal(size=(50, 6)), rng.normal(size=(7, 6))
    expected = [min(range(7), key=lambda k: float(((v - centres[k]) ** 2).sum())) for v in vectors]
    assert nearest_centre(torch.from_numpy(vectors), torch.from_numpy(centres)).tolist() == expected


@pytest.mark.parametrize("count", [1, 3, 9])
def test_there_are_no_more_centres_than_different_vectors(count):
    vectors = np.repeat(np.eye(3), 5, axis=0)
    centres = cluster_centres(vectors, count, seed=0)
    assert len(centres) == min(count, 3)
    assert np.isfinite(centres).all()


def test_groups_take_turns_best_first_and_ties_go_by_id():
    ids = pa.array(["e", "d", "c", "b", "a"])
    score, group = np.array([0.9, 0.8, 0.7, 0.1, 0.1]), np.array([0, 0, 0, 1, 1])
    turns = take_turns(ids, score, group)
    order = [ids[i].as_py() for i in np.lexsort((np.array(ids.to_pylist()), -turns))]
    assert order == ["e", "a", "d", "b", "c"]
    assert (np.ceil(turns[[0, 1, 2, 4, 3]] - 0.51) == [0, -1, -2, 0, -1]).all()


def test_equal_scores_still_take_turns():
    ids = pa.array([f"x{i}" for i in range(6)])
    turns = take_turns(ids, np.full(6, 0.3), np.array([0, 0, 0, 1, 1, 2]))
    assert turns.tolist() == [0, -1, -2, 0, -1, 0]


def test_the_sample_is_the_same_in_any_order_of_the_pool(texts):
    pool = texts().pool
    other = pool.subset(np.random.default_rng(5).permutation(len(pool)), "pool")
    one, two = cluster_sample(pool, 1).ids, cluster_sample(other, 1).ids
    assert one.equals(two)
    assert len(set(one.to_pylist())) == min(100, len(pool))


class TestEmbedding:
    def test_its_head_holds_every_group(self, texts):
        task = texts()
        plain = Embedding().rank(task, seed=0, ledger=Ledger())
        diverse = Embedding(clusters=5).rank(task, seed=0, ledger=Ledger())
        assert set(np.flatnonzero(diverse.score >= 0)) >= {int(plain.score.argmax())}
        assert (diverse.score >= 0).sum() == 5
        rounds = -np.ceil(diverse.score - 0.5)
        for turn in np.unique(rounds):
            at = np.flatnonzero(rounds == turn)
            assert (np.argsort(-diverse.score[at]) == np.argsort(-plain.score[at])).all()

    def test_the_order_of_the_pool_and_the_batches_change_nothing(self, texts):
        task = texts()
        order = np.random.default_rng(2).permutation(len(task.pool))
        one = Embedding(clusters=4).rank(task, seed=0, ledger=Ledger()).score
        task.pool, pool = task.pool.subset(order, "pool"), task.pool
        try:
            two = Embedding(clusters=4, batch_tokens=1).rank(task, seed=0, ledger=Ledger()).score
        finally:
            task.pool = pool
        assert two == pytest.approx(one[order], abs=1e-6)

    @pytest.mark.parametrize("tokens", [1, 512])
    def test_what_it_costs_is_planned_and_charged(self, texts, tokens):
        task, ledger = texts(), Ledger()
        selector = Embedding(clusters=3, batch_tokens=tokens)
        selector.rank(task, seed=0, ledger=ledger)
        assert selector.rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=1e-9)
        n, d = len(task.pool), 6
        learned = 11 * similarity_flops(3, n, d) + 10 * n * d
        assert ledger.entries[SELECT, "clusters"].flops == learned + 3 * n * d + similarity_flops(3, n, d)
        without = Ledger()
        Embedding(batch_tokens=tokens).rank(task, seed=0, ledger=without)
        assert ledger.entries[SELECT, "embeddings"].flops > without.entries[SELECT, "embeddings"].flops
