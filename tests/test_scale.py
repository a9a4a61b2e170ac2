"""Large pools: hashes of many rows, streams without a permutation, external top-k, and memory that is bounded."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from baselines import bm25
from baselines.bm25 import Bm25, Okapi
from baselines.random import random_scores
from cads import draws, fingerprint, seeds, simplex
from cads.budget import Budget, Ledger
from cads.draws import Epochs, enciphered
from cads.errors import ConfigError, DataError, SelectionError
from cads.fingerprint import add_column, add_pairs, digests, row_digests
from cads.optimizer import subsample
from cads.order import ascending, best_first, distinct, rank_by_score
from cads.policy import BernoulliPolicy, project_capped_simplex
from cads.score_files import ScoreWriter, read_groups, stream_scores
from cads.scoring import score_pool
from cads.seeds import derive, derive_each
from cads.selection import Selection
from cads.task import Pool
from cads.topk import Best, best_of_files
from experiments import scaling
from experiments.scaling_data import HASHED, LONGEST_WORD, Texts, write_texts
from experiments.scaling_plan import on_gpus
from experiments.scaling_steps import SECTIONS, WHOLE_UPDATE, Row


class TestPolicy:
    @pytest.mark.parametrize("block", [1, 7, 64])
    def test_blocks_change_nothing_but_the_order_of_sums(self, monkeypatch, block):
        rng = np.random.default_rng(0)
        s = np.concatenate([[0.0, 1.0], project_capped_simplex(rng.random(58), 20.0)])
        whole = BernoulliPolicy(s, cap=25.0)
        masks = whole.sample(3, np.random.default_rng(1))
        gradient = rng.normal(size=60)
        log_prob, score, entropy = whole.log_prob(masks), whole.score(masks), whole.entropy()
        whole.step(gradient, 0.3)
        monkeypatch.setattr(simplex, "BLOCK", block)
        parts = BernoulliPolicy(s, cap=25.0)
        assert (parts.sample(3, np.random.default_rng(1)) == masks).all()
        assert (parts.score(masks) == score).all()
        assert parts.log_prob(masks) == pytest.approx(log_prob, rel=1e-12)
        assert parts.entropy() == pytest.approx(entropy, rel=1e-12)
        parts.step(gradient, 0.3)
        assert parts.probabilities == pytest.approx(whole.probabilities, abs=1e-12)

    def test_an_update_takes_less_than_40_bytes_an_example(self):
        n, rng = 400_000, np.random.default_rng(0)
        moved = BernoulliPolicy(project_capped_simplex(rng.random(n), 0.3 * n), cap=0.3 * n)
        tracemalloc.start()
        masks = moved.sample(1, rng)
        moved.log_prob(masks)
        moved.step(moved.score(masks)[0], 1e-3)
        extra = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert extra / n < 40

    def test_what_is_projected_is_left_as_it_was(self):
        s = np.array([0.5, 2.0, -1.0])
        project_capped_simplex(s, 1.0)
        assert s.tolist() == [0.5, 2.0, -1.0]


class TestFingerprint:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.text(max_size=4), st.binary(max_size=4)), min_size=1, max_size=20), st.integers(1, 9))
    def test_pairs_are_hashed_row_by_row_however_many_are_read_at_once(self, pairs, rows):
        one_by_one, together = hashlib.sha256(), hashlib.sha256()
        for name, content in pairs:
            one_by_one.update(name.encode() + b"\0" + content)
        names, contents = (pa.array(column) for column in zip(*pairs, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint, "ROWS", rows)
            add_pairs(together, names, contents)
        assert together.hexdigest() == one_by_one.hexdigest()

    @settings(deadline=None)
    @given(st.lists(st.binary(min_size=5, max_size=5), min_size=1, max_size=40))
    def test_equal_rows_and_no_others_have_equal_digests(self, rows):
        found = row_digests(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 5)).to_pylist()
        assert [found.index(x) for x in found] == [rows.index(x) for x in rows]

    def test_zeros_at_the_end_are_not_padding(self):
        assert row_digests(np.zeros((1, 3), np.uint8)) != row_digests(np.zeros((1, 4), np.uint8))

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=3), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 9))
    def test_a_column_is_hashed_whatever_its_chunks_and_type(self, texts, cut, rows):
        def digest(column):
            made = hashlib.sha256()
            add_column(made, column)
            return made.hexdigest()

        whole = pa.array(texts, pa.string())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint, "ROWS", rows)
            # The rows that are read at once are part of the format, so all of these are read with the same number.
            same = {
                digest(x)
                for x in (
                    whole,
                    pa.chunked_array([whole[:cut], whole[cut:]]),
                    pa.array(["x", *texts], pa.large_string())[1:],
                    whole.dictionary_encode(),
                )
            }
        assert len(same) == 1

    def test_where_a_text_ends_is_hashed(self):
        one, other = hashlib.sha256(), hashlib.sha256()
        add_column(one, pa.array(["ab", "c"]))
        add_column(other, pa.array(["a", "bc"]))
        assert one.hexdigest() != other.hexdigest()

    @given(st.lists(st.binary(max_size=9), max_size=20), st.integers(1, 9))
    def test_digests_are_those_of_each_content(self, contents, rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint, "ROWS", rows)
            found = digests(np.frombuffer(x, np.uint8) for x in contents)
        assert found.type == pa.large_binary()
        assert found.to_pylist() == [hashlib.blake2b(x, digest_size=16).digest() for x in contents]


class TestSeeds:
    @settings(deadline=None)
    @given(
        st.lists(st.text(max_size=5), max_size=20),
        st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32])),
        st.integers(1, 7),
    )
    def test_many_at_once_are_those_of_each(self, names, seed, block):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(seeds, "BLOCK", block)
            found = derive_each(seed, pa.array(names, pa.string()))
        assert found.tolist() == [derive(seed, name) for name in names]

    @pytest.mark.parametrize("own", [[0], [7], [3, 9]])
    def test_words_that_are_zero_count_as_numpy_counts_them(self, own, monkeypatch):
        numbers = np.array([0, 5, 2**32, 2**32 - 1, 2**40 + 1], np.uint64)
        whole = sum(word << 32 * i for i, word in enumerate(own))
        monkeypatch.setattr(seeds, "_hashed", lambda name: int(name).to_bytes(8, "little"))
        expected = [int(np.random.SeedSequence([whole, int(x)]).generate_state(1, np.uint64)[0] >> 1) for x in numbers]
        assert derive_each(whole, pa.array(list(map(str, numbers)))).tolist() == expected

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_a_seed_that_is_none_is_refused(self, seed):
        with pytest.raises(ConfigError, match="seed ="):
            derive_each(seed, pa.array(["a"]))

    def test_random_scores_travel_with_ids(self, features):
        pool = features().pool
        order = np.random.default_rng(0).permutation(len(pool))
        scores = random_scores(pool, 3)
        assert (random_scores(pool.part(order, "pool"), 3) == scores[order]).all()
        assert scores[4] == derive(3, pool.ids[4].as_py()) / 2**63
        assert kstest(scores, "uniform").pvalue > 1e-3


class TestStreams:
    @pytest.mark.parametrize("shuffled", [1, 100])
    def test_nothing_can_be_taken(self, monkeypatch, shuffled):
        monkeypatch.setattr(draws, "SHUFFLED", shuffled)
        assert Epochs(np.arange(5), 0).take(3, 0).tolist() == []

    @settings(deadline=None)
    @given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
    def test_the_cipher_is_a_permutation(self, n, seed):
        keys = np.random.default_rng(seed).integers(2**64, size=draws.ROUNDS, dtype=np.uint64)
        assert np.array_equal(np.sort(enciphered(np.arange(n), n, keys)), np.arange(n))

    @pytest.mark.parametrize("n", [draws.SHUFFLED + 7, 10**9])
    def test_the_cipher_scatters_neighbours_evenly(self, n):
        found = []
        for seed in range(16):
            keys = np.random.default_rng(seed).integers(2**64, size=draws.ROUNDS, dtype=np.uint64)
            found.append(enciphered(np.arange(4096) + seed * 5000, n, keys))
        bins = np.stack(found) * 16 // n
        assert chisquare(np.bincount(bins.ravel())).pvalue > 1e-3
        neighbours = np.bincount((16 * bins[:, :-1] + bins[:, 1:]).ravel(), minlength=256)
        assert chisquare(neighbours).pvalue > 1e-3
        epochs = np.bincount((16 * bins[:-1] + bins[1:]).ravel(), minlength=256)
        assert chisquare(epochs).pvalue > 1e-3

    @settings(deadline=None)
    @given(st.integers(5, 200), st.integers(0, 99), st.integers(1, 50))
    def test_large_epochs_hold_each_position_once_however_they_are_cut(self, n, seed, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draws, "SHUFFLED", 4)
            positions = np.random.default_rng(seed).permutation(3 * n)[:n]
            whole = Epochs(positions, seed).take(0, 2 * n)
            stream = Epochs(positions, seed)
            cut = np.concatenate([stream.take(i, min(count, 2 * n - i)) for i in range(0, 2 * n, count)])
        assert np.array_equal(whole, cut)
        for epoch in (whole[:n], whole[n:]):
            assert np.array_equal(np.sort(epoch), np.sort(positions))
        if n > 20:
            assert not np.array_equal(whole[:n], whole[n:])

    def test_a_batch_of_a_large_pool_takes_no_memory_of_its_size(self):
        stream = Epochs(np.arange(2 * draws.SHUFFLED), 0)
        tracemalloc.start()
        stream.take(10**6, 64)
        extra = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert extra < 10**5

    @settings(deadline=None)
    @given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99))
    def test_a_subsample_of_many_sources_is_that_of_each(self, sources, fidelity, seed):
        rng = np.random.default_rng(seed)
        codes = rng.permutation(np.concatenate([np.arange(sources), rng.integers(0, sources, 60)]))
        contents = rng.integers(0, 50, len(codes))

        class Contents:
            def __len__(self):
                return len(contents)

            def digests(self):
                return [str(c).encode() for c in contents]

        pool = Pool([str(i) for i in range(len(codes))], Contents(), codes, [str(s) for s in range(sources)])
        place = np.random.default_rng(seed).permutation(pool.contents.max() + 1)[pool.contents]
        expected = []
        for source in range(sources):
            members = np.flatnonzero(codes == source)
            distinct = np.unique(place[members])
            expected += members[place[members] <= distinct[max(1, round(fidelity * len(distinct))) - 1]].tolist()
        assert subsample(pool, fidelity, seed).tolist() == sorted(expected)


SCORES = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, 7.0]), min_size=1, max_size=60)


def shuffled_ids(n, seed):
    return pa.array([f"e{i}" for i in np.random.default_rng(seed).permutation(n)])


class TestOrder:
    @settings(deadline=None)
    @given(SCORES, st.integers(0, 9))
    def test_ids_that_ascend_are_ranked_as_others_are(self, scores, seed):
        score, ids = np.array(scores), shuffled_ids(len(scores), seed)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], ids[i].as_py()))
        assert best_first(ids, score).tolist() == order
        by_id = np.argsort(ids.to_numpy(zero_copy_only=False))
        sorted_ids = ids.take(pa.array(by_id))
        assert ascending(sorted_ids)
        assert [int(by_id[i]) for i in best_first(sorted_ids, score[by_id])] == order
        assert rank_by_score(ids, score)[order].tolist() == list(range(len(order)))

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=2), max_size=12), st.integers(0, 12))
    def test_ids_are_distinct_or_not_whatever_their_order(self, ids, cut):
        for listed in (ids, sorted(ids, key=str.encode)):
            column = pa.chunked_array([pa.array(listed[:cut], pa.string()), pa.array(listed[cut:], pa.string())])
            assert distinct(column) == (len(set(ids)) == len(ids))


class TestBest:
    @settings(deadline=None)
    @given(SCORES, st.integers(1, 70), st.integers(0, 9), st.lists(st.integers(0, 60), max_size=6))
    def test_it_is_the_head_of_the_ranking_in_memory(self, scores, k, seed, cuts):
        score, ids = np.array(scores), shuffled_ids(len(scores), seed)
        best = Best(k)
        edges = [0, *sorted(min(c, len(score)) for c in cuts), len(score)]
        for a, b in pairwise(edges):
            best.add(ids[a:b], score[a:b])
        found, values = best.result()
        order = best_first(ids, score)[:k]
        assert found.to_pylist() == ids.take(pa.array(order)).to_pylist()
        assert (values == score[order]).all()

    @settings(deadline=None)
    @given(SCORES, st.floats(0.5, 30), st.integers(0, 9), st.integers(1, 20))
    def test_what_costs_allow_is_the_prefix_that_fits(self, scores, most, seed, shard):
        score, ids = np.array(scores), shuffled_ids(len(scores), seed)
        cost = np.random.default_rng(seed).choice([0.25, 0.5, 1.0, 3.0], len(score))
        best = Best(most)
        for a in range(0, len(score), shard):
            best.add(ids[a : a + shard], score[a : a + shard], cost[a : a + shard])
        kept, spent = [], 0.0
        for i in best_first(ids, score).tolist():
            spent += cost[i]
            if spent > most and kept:
                break
            kept.append(ids[i].as_py())
        assert best.result()[0].to_pylist() == kept

    def test_memory_is_that_of_what_is_kept_and_of_a_shard(self):
        best, rng = Best(50), np.random.default_rng(0)
        for start in range(0, 20_000, 1000):
            best.add(pa.array([f"{start + i:06d}" for i in range(1000)]), rng.random(1000))
            assert len(best._kept) + best._n_new <= 2 * (50 + 1)
        assert len(best.result()[0]) == 50

    def test_bad_input_is_named(self):
        with pytest.raises(ConfigError, match="positive"):
            Best(0)
        with pytest.raises(DataError, match="not finite"):
            Best(1).add(pa.array(["a"]), np.array([np.nan]))
        for ids, score, cost in (
            (pa.array(["a", "b"]), np.zeros(1), None),
            (pa.array([1]), np.zeros(1), None),
            (pa.array(["a"]), np.zeros(1), np.ones(2)),
        ):
            with pytest.raises(DataError, match="one of each"):
                Best(1).add(ids, score, cost)
        best = Best(3)
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
        task, whole, parts = features(), Ledger(), Ledger()
        model = task.model(0).eval()
        how = {"stage": "scores"}
        expected = score_pool(task.pool, lambda b: task.losses(model, b), task.costs.forward, ledger=whole, **how)
        path = tmp_path / "s.parquet"
        stream_scores(
            task.pool, lambda b: task.losses(model, b), task.costs.forward, path, ledger=parts, shard=33, **how
        )
        (ids, found), *_ = read_groups([path])
        assert ids.equals(task.pool.ids)
        assert found == pytest.approx(expected, rel=1e-6)
        assert parts.total().flops == whole.total().flops


class TestSelections:
    def made(self, sources):
        ids = pa.array(["c", "a", "b"])
        score = np.array([0.1, 0.9, 0.5])
        return Selection(ids, score, score, score > 0.3, "m", 0, Budget(1.0), Ledger(), "h", sources=sources)

    def test_sources_are_codes_and_come_back(self, tmp_path):
        made = self.made(["x", "y", "x"])
        assert pa.types.is_dictionary(made.sources.type)
        loaded = Selection.load(made.save(tmp_path / "s"))
        assert loaded.sources.to_pylist() == ["x", "y", "x"]
        assert loaded.content_hash == made.content_hash
        assert loaded.by_source() == [("x", 2, 1, pytest.approx(0.3)), ("y", 1, 1, 0.9)]
        assert self.made(["x", "y", "y"]).content_hash != made.content_hash

    def test_sources_of_another_length_are_refused(self):
        with pytest.raises(SelectionError, match="2 sources for 3"):
            self.made(["x", "y"])

    def test_ids_that_are_no_strings_are_refused(self, features):
        with pytest.raises(DataError, match="type int64"):
            Pool(pa.array([1, 2]), features().pool.examples.take(np.arange(2)))


class TestBm25:
    def test_documents_that_are_read_again_score_the_same(self, monkeypatch):
        rng = np.random.default_rng(0)
        documents = [[f"w{w}" for w in rng.geometric(0.2, rng.integers(0, 9))] for _ in range(60)]
        chunks = [pa.array(documents[a : a + 13], pa.list_(pa.string())) for a in range(0, 60, 13)]
        kept = Okapi(chunks)
        monkeypatch.setattr(bm25, "KEPT", 20)
        streamed = Okapi(chunks)
        assert streamed._kept is None
        queries = [np.asarray(kept.count(pa.array([q])).sum(axis=0)) for q in (["w1", "w4"], ["w2"], ["none"])]
        assert (streamed.idf == kept.idf).all()
        assert (streamed.document_frequency == kept.document_frequency).all()
        assert streamed.n_postings == kept.n_postings
        assert (streamed.scores(*queries) == np.max([kept.scores(q) for q in queries], axis=0)).all()

    def test_texts_are_asked_for_chunk_by_chunk(self, texts, monkeypatch):
        task, sizes = texts(), []
        expected = Bm25().rank(task, seed=0, ledger=Ledger()).score
        monkeypatch.setattr(bm25, "CHUNK", 9)
        monkeypatch.setattr(bm25, "KEPT", 0)
        whole = task.texts
        task.texts = lambda pool: sizes.append(len(pool)) or whole(pool)
        assert (Bm25().rank(task, seed=0, ledger=Ledger()).score == expected).all()
        assert sorted(sizes)[-2] <= 9
        assert max(sizes) == len(task.target)


class TestExperiment:
    def test_every_section_can_be_measured(self, tmp_path):
        for name, section in SECTIONS.items():
            folder = tmp_path / name
            folder.mkdir()
            rows = section(5000, folder)
            assert {r.section for r in rows} == {name}
            assert all(r.seconds >= 0 and r.peak > 0 for r in rows)

    def test_words_are_counted_where_their_hash_says(self, tmp_path):
        write_texts(tmp_path / "t.arrow", 30)
        texts = Texts.of(tmp_path / "t.arrow")
        counted = texts.batch(np.arange(30)).inputs["x"].numpy()
        for row, text in zip(counted, texts.texts().to_pylist(), strict=True):
            expected = np.zeros(HASHED)
            for word in text.split(" "):
                padded = word.encode().ljust(LONGEST_WORD, b"\0")
                expected[int.from_bytes(hashlib.blake2b(padded, digest_size=16).digest()[:4], "little") % HASHED] += 1
            np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-6)

    def test_texts_in_pieces_are_those_of_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr("experiments.scaling_data.PIECE", 64)
        write_texts(tmp_path / "t.arrow", 200)
        texts = Texts.of(tmp_path / "t.arrow")
        every = texts.texts().to_pylist()
        rows = np.random.default_rng(0).permutation(200)
        assert [every[i] for i in np.sort(rows[:50])] == texts.take(np.sort(rows[:50])).texts().to_pylist()
        assert texts.digests().take(pa.array(rows)) == texts.take(rows).digests()
        assert len(set(every)) == len(texts.digests().unique())

    def test_the_table_is_made_of_the_rows(self, tmp_path, monkeypatch):
        def measured(section, n):
            step = WHOLE_UPDATE if section == "policy" else "save"
            return [Row(section, step, n, n * 2e-8 * (1 + (n > 10**6)), 18 * n, 7 * 10**8)]

        monkeypatch.setattr(scaling, "measure", measured)
        out = tmp_path / "growth.md"
        assert scaling.main(["--out", str(out), "--sections", "policy", "selection"]) == 0
        text = out.read_text()
        assert "20 to 40 ns an example, a factor of 2.00 (within 2), and 18.0 bytes" in text
        assert "| save | 1,000,000 | 0.02 | 0.02 |" in text
        # 10^9 examples at 40 ns are 40 s of a core.
        assert re.search(r"\| policy: draw.* \| 0\.0111 \(40 s\) \|", text)
        assert (tmp_path / "scaling.png").stat().st_size > 10_000
        assert len(json.loads(out.with_suffix(".json").read_text())) == 6
        assert scaling.main(["--out", str(out), "--render"]) == 0
        assert out.read_text() == text

    def test_the_plan_counts_a_forward_pass_of_every_example(self):
        flops = {line.method: line.flops for line in on_gpus()}
        # 2 N D for the 6.6e9 weights of Llama-2 7B in linear layers, at 512 positions, and attention on top.
        least = 2 * 6.6e9 * 512 * 1e9
        assert least < flops["ppl"] < 1.5 * least
        assert flops["cads-e"] > 2 * least > flops["embedding"] > flops["bm25"]
