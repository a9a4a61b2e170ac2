"""The speed-up and the ablations: what a sweep holds, what is read off it, and both commands on a tiny world."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from baselines.bilevel import Bilevel
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import ConfigError
from experiments import ablations, oracle, speedup
from experiments.oracle_report import Cell
from experiments.speedup import NESTED, NESTED_WORLD, Method, choices, nested_world
from experiments.speedup_report import Mean, Point, curve, markdown, ratio, reach
from experiments.unrolled import Unrolled
from experiments.worlds import read_world

SPECS = ("{name: a, size: 60}", "{name: b, size: 60, label_noise: 0.9}", "{name: c, size: 60, classes: [0, 1, 2, 3]}")
WORLD = """
task:
  dataset: digits
  hidden: 8
  n_target: 60
  n_test: 60
  sources: [{sources}]
train: {{batch_size: 16, learning_rate: 0.003}}
"""
BUDGET = Budget(4, "epochs")
SMALL = {
    "search": Method("search", (0.1, 2.0)),
    "bilevel, C/4": Method("bilevel", (0.5, 2.0, 4.5), {"share": 0.25}),
    "unrolled": Method("unrolled", (0.5, 1.5, 3.0), {"unroll": 4}, course=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a world of three sources stands, and one whose sources have the names of the second part."""
    place = tmp_path_factory.mktemp("speedup")
    (place / "tiny.yaml").write_text(WORLD.format(sources=", ".join(SPECS)))
    named = ", ".join(f'{{name: "{name}", size: 40}}' for name in sorted(NESTED))
    (place / "many.yaml").write_text(WORLD.format(sources=named))
    return place


@pytest.fixture(scope="module")
def task(folder):
    return read_world(folder / "tiny.yaml").build()


@pytest.fixture
def small(monkeypatch):
    """Short sweeps, and how often each label was run."""
    ran: Counter[str] = Counter()

    def counted(method, *rest):
        ran[next(label for label, m in SMALL.items() if m is method)] += 1
        return choices(method, *rest)

    monkeypatch.setattr(speedup, "METHODS", SMALL)
    monkeypatch.setattr(speedup, "choices", counted)
    return ran


def run(place, *more):
    words = ["--world", place / "tiny.yaml", "--budgets", "4", "--sources", "2", "--sources-world", place / "many.yaml"]
    words += ["--sources-passes", "2", "--seeds", "2", "--truth-seeds", "2", "--methods", ";".join(SMALL)]
    words += ["--cache", place / "cells", "--truth", place / "truth", "--json", place / "all.json"]
    return speedup.main([*map(str, words), *map(str, more)])


@pytest.mark.parametrize("label", [label for label, method in SMALL.items() if method.course])
def test_a_course_holds_the_runs_of_smaller_allowances(task, label):
    method = SMALL[label]
    for choice in choices(method, task, BUDGET, seed=1):
        ledger = Ledger()
        selection = method.selector(choice.allowance).select(task, BUDGET, seed=1, ledger=ledger)
        assert (choice.selection.selected == selection.selected).all()
        assert choice.cost == pytest.approx(ledger.total(SELECT).flops / BUDGET.flops(task), rel=1e-9)
        assert choice.cost <= choice.allowance * (1 + 1e-9)
    assert choice.cost > 0


def test_both_parts_run_and_go_on_where_they_were(folder, small):
    assert run(folder, "--results", folder / "table.md") == 0
    assert small == {label: 4 for label in SMALL}
    first = json.loads((folder / "all.json").read_text())
    assert run(folder) == 0
    assert small == {label: 4 for label in SMALL}
    again = json.loads((folder / "all.json").read_text())
    assert again["by_budget"] == first["by_budget"]
    assert again["by_sources"] == first["by_sources"]
    points = [Point(**p) for p in first["by_budget"]]
    assert {(p.method, p.seed, p.allowance) for p in points} == {
        (label, seed, a) for label, method in SMALL.items() for seed in (0, 1) for a in method.allowances
    }
    known = {p.regret_acc for p in points if p.chosen == [1, 1, 1]}
    assert len(known) == 1, "the same choice has the same regret"
    assert {(p["world"], p["sources"]) for p in first["by_sources"]} == {("many-2", 2)}
    assert "| 4 | bilevel, C/4 |" in (folder / "table.md").read_text()
    with Image.open(folder / "table.png") as image:
        assert image.width > 300


@pytest.mark.parametrize(
    "more", [["--methods", "cads-x"], ["--sources", "1"], ["--seeds", "0"], ["--budgets", "many"], ["--fresh", "x"]]
)
def test_bad_arguments_are_refused(folder, small, capsys, more):
    assert run(folder, *more) == 1
    assert "ConfigError: --" in capsys.readouterr().out or more[0] == "--budgets"
    assert not small


def test_nested_worlds_grow_by_the_same_order(folder):
    world = read_world(speedup.BUILT_IN / f"{NESTED_WORLD}.yaml")
    names = [[spec.name for spec in nested_world(world, n).task.sources] for n in (2, 5, 13)]
    assert names == [list(NESTED[:n]) for n in (2, 5, 13)]
    with pytest.raises(ConfigError, match="--sources 14"):
        nested_world(world, 14)
    with pytest.raises(ConfigError, match="in a world of the sources"):
        nested_world(read_world(folder / "tiny.yaml"), 2)


def point(allowance, cost, regret, seed=0, world="w"):
    return Point(world, 3, 4.0, "m", seed, allowance, cost, cost / 2, cost, [1.0], 0.0, regret)


def test_a_curve_is_the_mean_and_leaves_out_what_buys_nothing_more():
    points = [point(1, 0.0, 0.04), point(2, 1.6, 0.02), point(2, 2.0, 0.01, seed=1), point(3, 1.8, 0.015)]
    points += [point(4, 3.0, 0.0, world=w) for w in "wv"]
    assert [(m.cost, m.cpu_seconds, m.regret) for m in curve(points)] == [
        (0.0, 0.0, 0.04),
        (1.8, 1.8, 0.015),
        (3.0, 3.0, 0.0),
    ]


def test_the_table_has_the_seconds_that_other_jobs_do_not_change():
    points = [replace(point(a, a, 0.0), seconds=1e6 * a, cpu_seconds=7.0 * a) for a in (1, 2)]
    header, _, row = markdown(points, []).split("\n\n")[2].splitlines()[:3]
    assert header.count("CPU seconds") == 2
    assert "| 7.0 |" in row


def test_other_rates_of_the_unrolled_sgd_are_contenders():
    rates = {m.options.get("rate", Unrolled.rate) for m in speedup.METHODS.values() if m.name == "unrolled"}
    assert rates == {0.03, 0.1, 0.3}
    for method in speedup.METHODS.values():
        method.selector(1.0)


def test_a_regret_is_reached_at_the_least_cost():
    sweep = [Mean(0.0, 0, 0.03, 0), Mean(1.0, 2, 0.009, 0), Mean(2.0, 4, 0.012, 0)]
    assert reach(sweep, 0.01) == sweep[1]
    assert reach(sweep, 0.03) == sweep[0]
    assert reach(sweep, 0.005) is None


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [(2.0, 5.0, "2.5"), (2.0, None, "> 15"), (None, 1.5, "< 0.3"), (None, None, "-"), (0.0, 3.0, "-"), (2.0, 0.0, "0")],
)
def test_a_ratio_is_bounded_where_one_is_not_reached(first, other, expected):
    assert ratio(first, 5.0, other, 30.0) == expected


def test_a_mean_baseline_is_a_leave_one_out_that_adam_cannot_tell(task):
    draws = [
        Bilevel(allowance=4.0, share=0.25, baseline=b).select(task, BUDGET, seed=0, ledger=Ledger()).source_probability
        for b in ("loo", "mean", "none")
    ]
    loo, mean, none = (np.array(list(d.values())) for d in draws)
    np.testing.assert_allclose(loo, mean, atol=1e-5)
    assert np.abs(loo - none).max() > 1e-3
    with pytest.raises(ConfigError, match="baseline = 'median'"):
        Bilevel(baseline="median")


def test_ablations_run_and_go_on_where_they_were(folder, monkeypatch):
    words = ["--world", folder / "tiny.yaml", "--budgets", "4", "--seeds", "2", "--truth-seeds", "2"]
    words += ["--parts", "guard,outer,K of direct", "--json", folder / "ablations.json"]
    words += ["--cache", folder / "oracle", "--truth", folder / "truth", "--results", folder / "ablations.md"]
    assert ablations.main(list(map(str, words))) == 0
    record = json.loads((folder / "ablations.json").read_text())
    cells = [Cell(**c) for c in record["cells"]]
    assert len(cells) == 2 * len({c.method for c in cells}) == 2 * 8
    text = (folder / "ablations.md").read_text()
    assert text.count("| guard |") == 2
    assert text.count("| outer |") == 5
    assert text.count(" * |") >= 1
    monkeypatch.setattr(oracle, "value_of", None)
    assert ablations.main(list(map(str, words))) == 0
    assert (folder / "ablations.md").read_text() == text
    assert ablations.main([*map(str, words), "--fresh", "halving"]) == 1
    with pytest.raises(TypeError):
        ablations.main([*map(str, words), "--fresh", "direct"])


def test_each_line_of_a_part_changes_one_option_of_the_first():
    for part in set(ablations.PARTS) - {"estimator"}:
        first, *others = [v.who for v in ablations.VARIANTS if v.part == part]
        assert others
        base = vars(oracle.build_selector(first.method, first.options))
        for who in others:
            assert who.method == first.method
            here = vars(oracle.build_selector(who.method, who.options))
            assert len([name for name in base if here[name] != base[name]]) == 1


def test_the_default_outer_objective_is_called_what_it_is(folder):
    first = next(v for v in ablations.VARIANTS if v.part == ablations.OUTER)
    assert first.value == f"{read_world(folder / 'tiny.yaml').build().source_outer} (default)".replace("_", " ")


def test_the_lowest_regret_of_each_world_is_marked():
    regret = {("u", "search"): 0.02, ("u", "search, outer error"): 0.01, ("v", "search, outer loss"): -0.01}
    labels = [v.who.label for v in ablations.VARIANTS if v.part == ablations.OUTER]
    cells = [Cell(w, 4.0, m, 0, [1.0], 0.0, regret.get((w, m), 0.03), 0.0, 0.0, [], []) for w in "uv" for m in labels]
    rows = ablations.outer_by_world(cells, ["u", "v"])
    assert [row[0] for row in rows if row[1].endswith(" *")] == ["error"]
    assert [row[0] for row in rows if row[2].endswith(" *")] == ["loss"]


def test_an_option_younger_than_a_cell_leaves_its_key_as_it_was():
    for method in ("search", "cads-s-penalty"):
        plain = oracle.build_selector(method)
        assert "policy_steps" not in oracle.settings_of(plain)
        assert ("alpha" in oracle.settings_of(plain)) == (method == "cads-s-penalty")
    given = oracle.settings_of(oracle.build_selector("search", {"alpha": 0.0, "policy_steps": 0}))
    assert (given["alpha"], given["policy_steps"]) == ("0.0", "0")


def test_a_difference_is_taken_cell_by_cell():
    def cell(method, seed, world, regret):
        return Cell(world, 4.0, method, seed, [1.0], 0.0, regret, 0.0, 0.0, [], [])

    cells = [cell("search", s, w, 0.1 * s + r) for s in (0, 1) for w, r in (("u", 0.0), ("v", 0.5))]
    cells += [cell("other", s, w, 0.1 * s + r + 0.02 + 0.02 * s) for s in (0, 1) for w, r in (("u", 0.0), ("v", 0.5))]
    mean, width = ablations.difference(cells, "other", "search")
    assert mean == pytest.approx(0.03)
    # t(1 degree of freedom) = 12.706; the standard error of 0.02 and 0.04 is 0.01.
    assert width == pytest.approx(0.12706, rel=1e-3)


def test_every_variant_can_be_built_and_unknown_parts_are_refused():
    labels = [c.label for c in ablations.contenders(ablations.PARTS)]
    assert labels[0] == "search"
    assert len(set(labels)) == len(labels) == 21
    for who in ablations.contenders(ablations.PARTS):
        oracle.build_selector(who.method, who.options)
    with pytest.raises(ConfigError, match="colour"):
        ablations.contenders(["colour"])
