"""Pools that are larger than memory: files of scores, and the best of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.accounting.ledger import Ledger
from cads.data.ids import best_first
from cads.errors import ConfigError, DataError
from cads.scoring.pool_scores import score_pool
from cads.scoring.score_files import ScoreWriter, read_groups, stream_scores
from cads.scoring.top_k import TopK, best_of_files

SCORES = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=60)


def shuffled_ids(n, seed):
    return pa.array([f"e{i}" for i in np.random.default_rng(seed).permutation(n)])


class TestBest:
    @settings(deadline=None)
    @given(SCORES, st.integers(1, 70), st.integers(0, 9), st.lists(st.integers(0, 60), max_size=6))
    def test_it_is_the_head_of_the_ranking_in_memory(self, scores, k, seed, cuts):
        score, ids = np.array(scores), shuffled_ids(len(scores), seed)
        best = TopK(k)
        edges = [0, *sorted(min(c, len(score)) for c in cuts), len(score)]
        for a, b in pairwise(edges):
            best.add(ids[a:b], score[a:b])
        result, values = best.result()
        order = best_first(ids, score)[:k]
        assert result.to_pylist() == ids.take(pa.array(order)).to_pylist()
        assert (values == score[order]).all()

    @settings(deadline=None)
    @given(SCORES, st.floats(0.5, 30), st.integers(0, 9), st.integers(1, 20))
    def test_what_costs_allow_is_the_prefix_that_fits(self, scores, most, seed, shard):
        score, ids = np.array(scores), shuffled_ids(len(scores), seed)
        cost = np.random.default_rng(seed).choice([0.25, 0.5, 1.0, 3.0], len(score))
        best = TopK(most)
        for a in range(0, len(score), shard):
            best.add(ids[a : a + shard], score[a : a + shard], cost[a : a + shard])
        chosen, spent = [], 0.0
        for i in best_first(ids, score).tolist():
            spent += cost[i]
            if spent > most and chosen:
                break
            chosen.append(ids[i].as_py())
        assert best.result()[0].to_pylist() == chosen

    def test_memory_is_that_of_what_is_kept_and_of_a_shard(self):
        best, rng = TopK(50), np.random.default_rng(0)
        for start in range(0, 20_000, 1000):
            best.add(pa.array([f"{start + i:06d}" for i in range(1000)]), rng.random(1000))
            assert len(best._kept) + best._n_new <= 2 * (50 + 1)
        assert len(best.result()[0]) == 50

    def test_bad_input_is_named(self):
        with pytest.raises(ConfigError, match="positive"):
            TopK(0)
        with pytest.raises(DataError, match="not finite"):
            TopK(1).add(pa.array(["a"]), np.array([np.nan]))
        for ids, score, cost in (
            (pa.array(["a", "b"]), np.zeros(1), None),
            (pa.array([1]), np.zeros(1), None),
            (pa.array(["a"]), np.zeros(1), np.ones(2)),
        ):
            with pytest.raises(DataError, match="one of each"):
                TopK(1).add(ids, score, cost)
        best = TopK(3)
        for _ in range(2):
            best.add(pa.array(["a", "b"]), np.array([1.0, 0.0]))
        with pytest.raises(DataError, match=r"more than once.*'a'"):
            best.result()


class TestScoreFiles:
    def test_what_is_written_comes_back_group_by_group(self, tmp_path):
        ids, score = shuffled_ids(1000, 0), np.random.default_rng(0).random(1000)
        with ScoreWriter(tmp_path / "s.parquet", group=256) as writer:
            for a in range(0, 1000, 90):
                writer.write(ids[a : a + 90], score[a : a + 90])
        assert writer.rows == 1000
        groups = list(read_groups([tmp_path / "s.parquet"]))
        assert max(len(x) for x, _ in groups) <= 256 + 90
        assert pa.concat_arrays([x for x, _ in groups]).equals(ids)
        assert (np.concatenate([x for _, x in groups]) == score).all()
        best, values = best_of_files([tmp_path / "s.parquet"], 10)
        order = best_first(ids, score)[:10]
        assert best.to_pylist() == ids.take(pa.array(order)).to_pylist()
        assert (values == score[order]).all()

    def test_a_failure_leaves_nothing(self, tmp_path):
        def fail():
            with ScoreWriter(tmp_path / "s.parquet") as writer:
                writer.write(pa.array(["a"]), np.array([1.0]))
                writer.write(pa.array(["b"]), np.array([np.inf]))

        with pytest.raises(DataError, match=r"not finite"):
            fail()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("ids", [pa.array([1]), pa.array([None], pa.string()), pa.array(["a"], pa.large_string())])
    def test_ids_that_are_no_strings_are_not_written(self, tmp_path, ids):
        with pytest.raises(DataError, match="ids of type"), ScoreWriter(tmp_path / "s.parquet") as writer:
            writer.write(ids, np.zeros(1))
        assert list(tmp_path.iterdir()) == []

    def test_what_is_no_score_file_is_refused(self, tmp_path):
        path = tmp_path / "s.parquet"
        for write, message in (
            (lambda: path.unlink(missing_ok=True), "cannot be|no score file"),
            (lambda: path.write_bytes(b"PAR1 none"), "no score file"),
            (lambda: pq.write_table(pa.table({"id": ["a"], "grade": [1.0]}), path), "columns"),
            (lambda: pq.write_table(pa.table({"id": ["a"], "score": pa.array([None], pa.float64())}), path), "missing"),
        ):
            write()
            with pytest.raises(DataError, match=message):
                list(read_groups([path]))

    def test_shards_are_scored_as_the_pool_is(self, features, tmp_path):
        task, at_once, parts = features(), Ledger(), Ledger()
        model = task.model(0).eval()
        how = {"stage": "scores"}
        expected = score_pool(task.pool, lambda b: task.losses(model, b), task.costs.forward, ledger=at_once, **how)
        path = tmp_path / "s.parquet"
        stream_scores(
            task.pool, lambda b: task.losses(model, b), task.costs.forward, path, ledger=parts, shard=33, **how
        )
        (ids, actual), *_ = read_groups([path])
        assert ids.equals(task.pool.ids)
        assert actual == pytest.approx(expected, rel=1e-6)
        assert parts.total().flops == at_once.total().flops
