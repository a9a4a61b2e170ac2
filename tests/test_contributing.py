"""The examples of CONTRIBUTING.md are true: the task and the selector are written, installed and run here."""

from __future__ import annotations

import importlib
import re
import shlex
import sys

import numpy as np
import pytest

import cads
from cads import registry
from cads.cli.main import main
from tests.support.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The module that the page tells to write, in an installed package with the entry points that it prints."""
    (tmp_path / "lines.py").write_text("\n\n".join(PYTHON[:2]))
    installed = tmp_path / "lines-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lines\nVersion: 1.0\n")
    groups = re.sub(r'project\.entry-points\."(.*?)"', r"\1", "\n".join(TOML)).replace('"', "")
    (installed / "entry_points.txt").write_text(groups)
    monkeypatch.syspath_prepend(tmp_path)
    registry.names.cache_clear()
    yield importlib.import_module("lines")
    del sys.modules["lines"]
    registry.names.cache_clear()


def commands():
    return [shlex.split(c) for c in re.findall(r"^    cads (.*--kind lines.*)$", TEXT, re.MULTILINE)]


def test_there_are_three_blocks():
    assert len(PYTHON) == 3
    assert len(TOML) == 1


def test_the_selector_keeps_what_it_should(lines, capsys):
    namespace = {}
    exec(compile(PYTHON[2], "CONTRIBUTING.md", "exec"), namespace)
    assert "'right'" in capsys.readouterr().out
    task, selection = namespace["task"], namespace["selection"]
    counts = {name: selected for name, _, selected, _ in selection.source_counts()}
    assert sum(counts.values()) == 200
    assert counts["right"] > 175
    chosen, full = (cads.train(task, "4 epochs", **of) for of in ({"selection": selection}, {"method": "full"}))
    assert chosen.metrics["loss"] < full.metrics["loss"] - 0.2
    by_name = cads.select(task, "4 epochs", method="low-loss", fraction=0.5)
    np.testing.assert_array_equal(by_name.selected, selection.selected)


def test_the_selector_is_charged_what_it_plans(lines):
    task, budget = lines.Lines(401, cads.TrainConfig(batch_size=20)), cads.Budget(4, "epochs")
    selector, ledger = lines.LowLoss(passes=3), cads.Ledger()
    selector.select(task, budget, seed=0, ledger=ledger)
    planned = selector.plan(task, budget)
    assert list(planned.entries) == list(ledger.entries)
    for stage, entry in planned.entries.items():
        assert entry.flops == ledger.entries[stage].flops > 0


def test_the_task_is_sound(lines):
    task = lines.LinesConfig(n_pool=40).build(cads.TrainConfig())
    task.check()
    assert task.pool.source_sizes.tolist() == [20, 20]
    shuffled = np.random.default_rng(0).permutation(40)
    assert sorted(task.pool.subset(shuffled, "pool").digests.to_pylist()) == sorted(task.pool.digests.to_pylist())


def test_the_commands_know_both(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [words[0] for words in commands()] == ["plan", "select"]
    for words in commands():
        assert main(words) == 0
    assert "low-loss" in capsys.readouterr().out
    selection = cads.Selection.load(tmp_path / "runs" / "lines")
    assert (selection.method, int(selection.selected.sum())) == ("low-loss", 200)


def test_the_map_is_that_of_the_contract():
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    table = TEXT.split("\n## Map\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == re.findall(r'"(\w+)"', contract[1])


def test_every_file_and_make_target_named_exists():
    for path in re.findall(r"`((?:cads|baselines|experiments|tests)/[\w/.-]*)`", TEXT):
        assert "NAME" in path or (ROOT / path).exists(), path
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make (\w+)", TEXT, re.MULTILINE)) <= targets


def test_lines_are_at_most_120_characters():
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
            assert len(line) <= 120, f"{name}:{number}"
