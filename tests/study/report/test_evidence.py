"""What the report shows of selections: the shares of sources are those of the training data."""

import json

import pytest

from cads.study.report.evidence import source_shares
from cads.study.tables import DONE, read_runs, write_rows


def add(folder, key, counts, shares):
    """A cell that selected so many examples of each source, of which training draws `shares`."""
    ids = [(source, f"{source}-{i}") for source, n in counts.items() for i in range(n)]
    selected = [{"cell": key, "id": name, "source": source, "rank": r} for r, (source, name) in enumerate(ids)]
    write_rows(folder, "selections", key, selected)
    stored = None if shares is None else json.dumps(shares)
    write_rows(folder, "runs", key, [{"cell": key, "status": DONE, "seed": 0, "shares": stored}])


def test_shares_are_those_of_training_and_not_of_the_number_of_examples(tmp_path):
    add(tmp_path, "a", {"right": 50, "wrong": 50}, {"right": 0.61, "wrong": 0.39})
    add(tmp_path, "b", {"right": 50, "wrong": 50}, {"right": 1.0, "wrong": 0.0})
    result = source_shares(tmp_path, {"mixture": read_runs(tmp_path)})
    assert result["mixture"] == pytest.approx({"right": 80.5, "wrong": 19.5})


def test_runs_of_older_versions_count_the_selected_examples(tmp_path):
    add(tmp_path, "a", {"right": 30, "wrong": 10}, None)
    assert source_shares(tmp_path, {"old": read_runs(tmp_path)})["old"] == {"right": 75.0, "wrong": 25.0}


def test_methods_that_draw_nothing_of_the_pool_are_left_out(tmp_path):
    add(tmp_path, "a", {}, {"right": 0.0, "wrong": 0.0})
    add(tmp_path, "b", {}, {})
    assert source_shares(tmp_path, {"target-only": read_runs(tmp_path)}) == {}
