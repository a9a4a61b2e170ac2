"""`cads check` says what the data is, and spends and writes nothing."""

import pytest
import yaml

from cads.cli.main import main
from tests.support.tiny_llama import model_folder, sums, write_lines


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        before = sorted(tmp_path.rglob("*"))
        assert main(["check", *map(str, words)]) == 0
        assert sorted(tmp_path.rglob("*")) == before
        return [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]

    return run


def test_texts_with_copies_in_two_files(said, tmp_path):
    model_folder(tmp_path / "llama")
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in sums(90)]
    for name, part in (("one", rows[:40] + rows[:3]), ("two", rows[40:60]), ("val", rows[60:]), ("test", rows[55:65])):
        write_lines(tmp_path / f"{name}.jsonl", part)
    flags = ("--pool", "one.jsonl", "--pool", "two.jsonl", "--target", "val.jsonl", "--model", "llama")
    lines = said(*flags)
    different = len({(row["prompt"], row["response"]) for row in rows[:60]})
    (pool,) = (line for line in lines if line.startswith("pool ") and "first" not in line)
    assert pool.split()[1:3] == ["63", str(different)]
    assert any(line.startswith("one 43 68.3%") for line in lines)
    assert any(line.startswith("two 20 31.7%") for line in lines)
    assert any(line.startswith("pool, first: ") and rows[0]["prompt"] in line for line in lines)
    assert "max_tokens: 128" in lines
    assert not any("left out" in line for line in lines)
    cut = said(*flags, "--task.max_tokens", "33")
    assert any(line.startswith("pool, one: ") and "cut of 43 rows" in line for line in cut)
    assert lines[-1].startswith("Nothing was spent")


def test_images_by_class(said, tmp_path):
    task = {
        "n_pool": 60,
        "n_target": 30,
        "n_test": 30,
        "sources": [{"name": "clean"}, {"name": "n", "label_noise": 0.5}],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"task": task}))
    lines = said("c.yaml")
    assert "target: 0 of 30 examples are in the pool too" in lines
    assert any(line.startswith("pool: 10 classes, of ") for line in lines)
    assert any(line.startswith("clean 30 50.0% 30") for line in lines)


def test_a_pool_without_sources(said, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"task": {"n_pool": 60, "n_target": 30, "n_test": 30}}))
    weighed = "single examples and groups by how much they are like the target"
    assert f"the pool has no sources: `cads` then weighs {weighed}" in said("c.yaml")


def test_what_cannot_be_used_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"task": {"n_pool": 10**6}}))
    assert main(["check", str(tmp_path / "c.yaml")]) == 1
    assert "n_pool = 1000000" in " ".join(capsys.readouterr().err.split())
