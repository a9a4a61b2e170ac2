"""Tokens and rows are read in pieces: nothing of them changes, and memory is bounded."""

from __future__ import annotations

import hashlib
import tracemalloc
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.tasks.language import rows as rows_module
from cads.tasks.language import token_cache
from cads.tasks.language import tokens as tokens_module
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.rows import Rows
from cads.tasks.language.token_cache import TokenCache
from cads.tasks.language.tokens import Tokens
from tests.support.tiny_llama import tokenizer

pytestmark = pytest.mark.usefixtures("small_shards")


def random_tokens(sizes, seed=0):
    rng, offsets = np.random.default_rng(seed), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ids = rng.integers(0, 9, offsets[-1]).astype(np.int32)
    names = pa.array([f"example {i}" for i in range(len(sizes))], pa.large_string())
    return Tokens(ids, rng.random(offsets[-1]) < 0.6, offsets, names, max_length=64)


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=40)


class TestPieces:
    @settings(deadline=None, max_examples=40)
    @given(SIZES, st.integers(0, 99), st.integers(1, 9), st.sampled_from([8, 16, 64]))
    def test_they_change_nothing(self, sizes, seed, sequences, tokens):
        result = random_tokens(sizes, seed)
        learned = [result.loss_mask[a:b] for a, b in zip(result.offsets[:-1], result.offsets[1:], strict=True)]
        last = {
            int(i)
            for i, m, n in zip(result.ids, result.loss_mask, [*result.loss_mask[1:], False], strict=True)
            if m > n
        }
        order = np.random.default_rng(seed).integers(0, len(sizes), 7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens_module, "SEQUENCES_AT_ONCE", sequences)
            patch.setattr(tokens_module, "TOKENS_AT_ONCE", tokens)
            assert result.answers.tolist() == [int(m[1:].sum()) for m in learned]
            assert result.last_answers == last
            mask_hash = hashlib.blake2b(np.packbits(result.loss_mask).tobytes(), digest_size=16)
            assert result.label_digest() == mask_hash.digest()
            taken = result.take(order)
            parts = [result.take(np.array([i])) for i in order]
        assert taken.ids.tolist() == [i for part in parts for i in part.ids.tolist()]
        assert taken.loss_mask.tolist() == [m for i in order for m in learned[i].tolist()]
        assert taken.texts.to_pylist() == [f"example {i}" for i in order]
        pairs = np.stack([result._widths(result.lengths()), result._widths(result.answers)], axis=1)
        _, first, codes = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
        representatives, same_cost = result.shapes()
        assert representatives.tolist() == first.tolist()
        assert same_cost.tolist() == codes.reshape(-1).tolist()

    @settings(deadline=None, max_examples=40)
    @given(st.sets(st.integers(0, 29), min_size=1), st.sets(st.integers(0, 30)), st.integers(1, 9))
    def test_drawn_rows_are_those_that_were_drawn(self, drawn, cuts, size):
        table = pa.table({"text": [f"row {i}" for i in range(30)]})
        edges = [0, *sorted(cuts), 30]
        chunks = pa.concat_tables([table.slice(a, b - a) for a, b in pairwise(edges)])
        rows = Rows(chunks, "text", pa.array([f"id-{i}" for i in range(30)]), "x")
        positions = np.array(sorted(drawn))
        once = rows.take(positions)
        twice = once.take(np.arange(len(positions))[::2])
        for actual, expected in ((rows, np.arange(30)), (once, positions), (twice, positions[::2])):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rows_module, "ROWS_AT_ONCE", size)
                shards = list(actual.shards())
            assert [len(t) for _, t in shards[:-1]] == [size] * (len(shards) - 1)
            assert [x for ids, _ in shards for x in ids.to_pylist()] == [f"id-{i}" for i in expected]
            assert [x for _, t in shards for x in t["text"].to_pylist()] == [f"row {i}" for i in expected]


class TestMemory:
    def test_encoding_takes_no_more_than_a_shard(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 1)
        monkeypatch.setattr(token_cache, "HASHED_AT_ONCE", 2**12)
        n, letters = 300, 300
        texts = pa.array([f"{i:04d}" + "abc " * (letters // 4) for i in range(n)])
        rows = Rows(pa.table({"text": texts}), "text", pa.array([str(i) for i in range(n)]), "x")
        tok = tokenizer()
        encoder = TokenEncoder(tok, Renderer(tok), 1000)
        cache = TokenCache(tmp_path / "cache", encoder)
        peaks = {}
        for name, encode in (
            ("memory", lambda: encoder.encode(rows)),
            ("made", lambda: cache.fetch([rows])),
            ("found", lambda: cache.fetch([rows])),
        ):
            tracemalloc.start()
            result = encode()[0]
            peaks[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            total = len(result.ids)
        held = total * 5
        assert total > n * letters
        assert peaks["memory"] > 2 * held
        # The shard under way, as Python objects, and a few numbers an example.
        assert peaks["made"] < held
        assert peaks["found"] < held / 2

    def test_mapped_arrays_are_not_copied(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tokens_module, "SEQUENCES_AT_ONCE", 2**11)
        monkeypatch.setattr(tokens_module, "TOKENS_AT_ONCE", 2**20)
        n, size = 10_000, 800
        rng = np.random.default_rng(0)
        rng.integers(0, 9, n * size, dtype=np.int32).tofile(tmp_path / "ids")
        (rng.random(n * size) < 0.5).tofile(tmp_path / "learned")
        mapped = [np.asarray(np.memmap(tmp_path / n, k, "r")) for n, k in (("ids", np.int32), ("learned", bool))]
        texts = pa.array(["x"] * n, pa.large_string())
        tracemalloc.start()
        tokens = Tokens(*mapped, np.arange(0, n * size + 1, size), texts)
        assert int(tokens.answers.sum()) == pytest.approx(n * (size - 1) / 2, rel=0.01)
        assert len(tokens.last_answers) == 9
        tokens.label_digest()
        tokens.digests()
        tokens.shapes()
        tokens.batch(np.arange(0, n, n // 8))
        tokens.take(np.arange(100))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.4 * 5 * n * size
