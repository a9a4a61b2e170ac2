"""The speed table on a model of a few thousand weights: all of it runs, and its ratios are medians over turns."""

import json

import pytest

from experiments import selector_speed
from experiments.selector_speed import Row, Turns, main, report
from tests.support.tiny_llama import model_folder, sums


@pytest.fixture
def files(tmp_path):
    rows = [{"question": row["prompt"], "answer": row["response"]} for row in sums(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--model", str(model_folder(tmp_path / "model")), "--data", str(tmp_path / "rows.jsonl")]


def test_a_table_with_every_part(files, tmp_path, monkeypatch):
    monkeypatch.setattr(selector_speed, "peer", lambda name: None)
    out = tmp_path / "results" / "speed.md"
    words = [*files, "--out", str(out), "--examples", "6", "--tokens", "64", "--texts", "40", "--longest", "64"]
    said = []
    assert main([*words, "--repeats", "2"], said.append) == 0
    assert said[:4] == ["gradients: done", "perplexity: done", "bm25: done", "embedding: done"]
    table = [line for line in out.read_text().splitlines() if line.startswith("| ")]
    for what in ("cads, float32", "cads, bf16", "batches of 512 tokens", "BM25", "SentenceTransformer.encode"):
        assert any(what in line for line in table), what
    assert sum("skipped" in line for line in table) == 4
    cosine = next(line for line in table if "smallest cosine to float32" in line)
    assert float(cosine.split("float32 ")[-1].split()[0]) > 0.99


def test_what_cannot_be_run_is_said(files, tmp_path):
    said = []
    words = [*files[:2], "--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x.md")]
    assert main(words, said.append) == 1
    assert "none.jsonl" in said[0]


def test_ratios_are_medians_over_turns(monkeypatch):
    """The machine is slow in the second turn, for both: the ratio does not notice."""
    clock = iter([0, 1, 1, 3, 3, 23, 23, 33, 33, 34, 34, 36.5])
    monkeypatch.setattr(selector_speed.time, "perf_counter", lambda: next(clock))
    calls = []
    ways = {"fast": lambda part: calls.append(f"fast {part}"), "slow": lambda part: calls.append(f"slow {part}")}
    turns = Turns(ways, 2, ["a"])
    assert calls == ["fast a", "slow a", "slow a", "fast a", "fast a", "slow a"]
    assert {name: x.tolist() for name, x in turns.seconds.items()} == {"fast": [[10], [1]], "slow": [[20], [2.5]]}
    assert turns.ratio("fast", "slow") == 2.25
    assert turns.rate("fast", 11) == 2


def test_parts_take_turns(monkeypatch):
    clock = iter([0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 3, 3, 8, 8, 38])
    monkeypatch.setattr(selector_speed.time, "perf_counter", lambda: next(clock))
    calls = []
    turns = Turns({name: lambda part, name=name: calls.append(f"{name}{part}") for name in "xy"}, 1, [1, 2])
    assert calls == ["x1", "y1", "y2", "x2", "y1", "x1", "x2", "y2"]
    assert {name: x.tolist() for name, x in turns.seconds.items()} == {"x": [[1, 5]], "y": [[2, 30]]}
    assert turns.ratio("x", "y") == 4
    assert turns.rate("x", 12) == 2


def test_what_misses_is_named():
    rows = [Row("gradients, examples/s", "cads", 1.0, "plain", 0.8, 0.9), Row("BM25, queries/s", "cads", 1.0)]
    assert "Below what is asked: gradients, cads (0.80 x plain)." in report(rows, "run", 0.0)
    assert "Every ratio is as asked." in report(rows[1:], "run", 0.0)
