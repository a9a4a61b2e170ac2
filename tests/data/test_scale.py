"""Pools of ten million examples and more: hashes, seeds, streams and orders."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from baselines.random import random_scores
from cads import seeding
from cads.data import hashing, permutation, streams
from cads.data.hashing import add_column, add_pairs, digests, row_digests
from cads.data.ids import all_distinct, ascending, best_first, rank_by_score
from cads.data.permutation import feistel_permutation
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.subsample import subsample
from cads.errors import ConfigError
from cads.seeding import derive, derive_each


class TestFingerprint:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.text(max_size=4), st.binary(max_size=4)), min_size=1, max_size=20), st.integers(1, 9))
    def test_pairs_are_hashed_row_by_row_however_many_are_read_at_once(self, pairs, rows):
        one_by_one, together = hashlib.sha256(), hashlib.sha256()
        for name, content in pairs:
            one_by_one.update(name.encode() + b"\0" + content)
        names, contents = (pa.array(column) for column in zip(*pairs, strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing, "ROWS", rows)
            add_pairs(together, names, contents)
        assert together.hexdigest() == one_by_one.hexdigest()

    @settings(deadline=None)
    @given(st.lists(st.binary(min_size=5, max_size=5), min_size=1, max_size=40))
    def test_equal_rows_and_no_others_have_equal_digests(self, rows):
        result = row_digests(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 5)).to_pylist()
        assert [result.index(x) for x in result] == [rows.index(x) for x in rows]

    def test_zeros_at_the_end_are_not_padding(self):
        assert row_digests(np.zeros((1, 3), np.uint8)) != row_digests(np.zeros((1, 4), np.uint8))

    @settings(deadline=None)
    @given(st.lists(st.text(max_size=3), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 9))
    def test_a_column_is_hashed_whatever_its_chunks_and_type(self, texts, cut, rows):
        def digest(column):
            digest_so_far = hashlib.sha256()
            add_column(digest_so_far, column)
            return digest_so_far.hexdigest()

        array = pa.array(texts, pa.string())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hashing, "ROWS", rows)
            # The rows that are read at once are part of the format, so all of these are read with the same number.
            same = {
                digest(x)
                for x in (
                    array,
                    pa.chunked_array([array[:cut], array[cut:]]),
                    pa.array(["x", *texts], pa.large_string())[1:],
                    array.dictionary_encode(),
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
            patch.setattr(hashing, "ROWS", rows)
            result = digests(np.frombuffer(x, np.uint8) for x in contents)
        assert result.type == pa.large_binary()
        assert result.to_pylist() == [hashlib.blake2b(x, digest_size=16).digest() for x in contents]


class TestSeeds:
    @settings(deadline=None)
    @given(
        st.lists(st.text(max_size=5), max_size=20),
        st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**32])),
        st.integers(1, 7),
    )
    def test_many_at_once_are_those_of_each(self, names, seed, block):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(seeding, "BLOCK", block)
            result = derive_each(seed, pa.array(names, pa.string()))
        assert result.tolist() == [derive(seed, name) for name in names]

    @pytest.mark.parametrize("own", [[0], [7], [3, 9]])
    def test_words_that_are_zero_count_as_numpy_counts_them(self, own, monkeypatch):
        numbers = np.array([0, 5, 2**32, 2**32 - 1, 2**40 + 1], np.uint64)
        seed = sum(word << 32 * i for i, word in enumerate(own))
        monkeypatch.setattr(seeding, "_hashed", lambda name: int(name).to_bytes(8, "little"))
        expected = [int(np.random.SeedSequence([seed, int(x)]).generate_state(1, np.uint64)[0] >> 1) for x in numbers]
        assert derive_each(seed, pa.array(list(map(str, numbers)))).tolist() == expected

    @pytest.mark.parametrize("seed", [-1, 2**64])
    def test_a_seed_that_is_none_is_refused(self, seed):
        with pytest.raises(ConfigError, match="seed ="):
            derive_each(seed, pa.array(["a"]))

    def test_random_scores_travel_with_ids(self, features):
        pool = features().pool
        order = np.random.default_rng(0).permutation(len(pool))
        scores = random_scores(pool, 3)
        assert (random_scores(pool.subset(order, "pool"), 3) == scores[order]).all()
        assert scores[4] == derive(3, pool.ids[4].as_py()) / 2**63
        assert kstest(scores, "uniform").pvalue > 1e-3


class TestStreams:
    @pytest.mark.parametrize("shuffled", [1, 100])
    def test_nothing_can_be_taken(self, monkeypatch, shuffled):
        monkeypatch.setattr(streams, "SHUFFLED", shuffled)
        assert ShuffledStream(np.arange(5), 0).take(3, 0).tolist() == []

    @settings(deadline=None)
    @given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
    def test_the_cipher_is_a_permutation(self, n, seed):
        keys = np.random.default_rng(seed).integers(2**64, size=permutation.ROUNDS, dtype=np.uint64)
        assert np.array_equal(np.sort(feistel_permutation(np.arange(n), n, keys)), np.arange(n))

    @pytest.mark.parametrize("n", [streams.SHUFFLED + 7, 10**9])
    def test_the_cipher_scatters_neighbours_evenly(self, n):
        result = []
        for seed in range(16):
            keys = np.random.default_rng(seed).integers(2**64, size=permutation.ROUNDS, dtype=np.uint64)
            result.append(feistel_permutation(np.arange(4096) + seed * 5000, n, keys))
        bins = np.stack(result) * 16 // n
        assert chisquare(np.bincount(bins.ravel())).pvalue > 1e-3
        neighbours = np.bincount((16 * bins[:, :-1] + bins[:, 1:]).ravel(), minlength=256)
        assert chisquare(neighbours).pvalue > 1e-3
        epochs = np.bincount((16 * bins[:-1] + bins[1:]).ravel(), minlength=256)
        assert chisquare(epochs).pvalue > 1e-3

    @settings(deadline=None)
    @given(st.integers(5, 200), st.integers(0, 99), st.integers(1, 50))
    def test_large_epochs_hold_each_position_once_however_they_are_cut(self, n, seed, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "SHUFFLED", 4)
            positions = np.random.default_rng(seed).permutation(3 * n)[:n]
            at_once = ShuffledStream(positions, seed).take(0, 2 * n)
            stream = ShuffledStream(positions, seed)
            cut = np.concatenate([stream.take(i, min(count, 2 * n - i)) for i in range(0, 2 * n, count)])
        assert np.array_equal(at_once, cut)
        for epoch in (at_once[:n], at_once[n:]):
            assert np.array_equal(np.sort(epoch), np.sort(positions))
        if n > 20:
            assert not np.array_equal(at_once[:n], at_once[n:])

    def test_a_batch_of_a_large_pool_takes_no_memory_of_its_size(self):
        stream = ShuffledStream(np.arange(2 * streams.SHUFFLED), 0)
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
        # Contents are numbered as they occur in the order of the ids.
        by_id = sorted(range(len(codes)), key=str)
        number = {c: i for i, c in enumerate(dict.fromkeys(contents[by_id].tolist()))}
        place = np.random.default_rng(seed).permutation(len(number))[[number[c] for c in contents.tolist()]]
        expected = []
        for source in range(sources):
            members = np.flatnonzero(codes == source)
            ranks = np.unique(place[members])
            expected += members[place[members] <= ranks[max(1, round(fidelity * len(ranks))) - 1]].tolist()
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
            assert all_distinct(column) == (len(set(ids)) == len(ids))
