"""The experiment on growth with the pool, made small."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pyarrow as pa

from experiments import scaling
from experiments.scaling_data import HASHED, LONGEST_WORD, Texts, write_texts
from experiments.scaling_plan import on_gpus
from experiments.scaling_steps import SECTIONS, WHOLE_UPDATE, Row


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
        assert flops["less"] > 2 * least > flops["embedding"] > flops["bm25"] > flops["cads"]
