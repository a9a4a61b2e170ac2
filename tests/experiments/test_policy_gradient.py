"""What the policy gradient is worth: rivals keep to allowances and find what is planted."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.recipe import TrainConfig
from cads.selectors.search.selector import PolicySearch
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from experiments import policy_gradient
from experiments.policy_gradient import KINDS, Cell, by_policy, is_right, main, sources_of, uncharged_steps
from experiments.policy_gradient_report import EXAMPLES, OFF, ONLINE, STEPS, Cells, verdict
from experiments.policy_gradient_rivals import (
    ORIGINS,
    EffectPosterior,
    SignalPrefix,
    UnchargedSteps,
    origin,
    prefix_shares,
)

N_SOURCES, PASSES = 8, 8.0
BAD = range(1, N_SOURCES, 2)
ALLOWANCES = (0.5, 2.0)
ARGUMENTS = ["--worlds", str(N_SOURCES), EXAMPLES, "--seeds", "0", "--allowances", "2"]


def cell(name=str(N_SOURCES), seed=0):
    """Half of the sources have random labels."""
    sources = [SyntheticSource(f"s{i}", 40, label_noise=0.9 if i in BAD else 0.0) for i in range(N_SOURCES)]
    config = VisionConfig(dataset="digits", hidden=16, n_target=80, sources=sources, data_seed=seed)
    return Cell(name, sources, lambda: config.build(TrainConfig(batch_size=16, learning_rate=5e-3)), PASSES, seed)


@pytest.fixture(scope="module")
def world():
    return cell()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy-gradient")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(policy_gradient.Cell, "of", cell)
        main(["--out", str(folder), *ARGUMENTS])
    return folder


def rows(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def chosen(row, count=N_SOURCES):
    return np.unpackbits(np.frombuffer(base64.b64decode(row["chosen"]), np.uint8))[:count].astype(bool)


def test_allowances_are_kept(out):
    found = {tuple(row["key"]): row for row in rows(out)}
    names = {(w, m.name) for w in (str(N_SOURCES), EXAMPLES) for m in cell(w).methods}
    assert {(key[0], key[2]) for key in found} == names
    searched = 0
    for (_, _, _, allowance), row in found.items():
        if "error" not in row:
            assert row["select"] <= allowance if allowance else row["select"] + row["train"] <= 1
            assert row["train"] > 0.9
            searched += row["select"] > 0.5 * allowance > 0
    assert searched >= 10


@pytest.mark.parametrize("name", ["prefix by signal", "thompson"])
@pytest.mark.parametrize("allowance", ALLOWANCES)
def test_rivals_spend_what_they_plan(world, name, allowance):
    budget, ledger = Budget(PASSES, "epochs"), Ledger()
    (method,) = (m for m in world.methods if m.name == name)
    selector = method.build(world.task, budget, allowance)
    planned = selector.plan(world.task, budget).total(SELECT).flops
    selector.select(world.task, budget, seed=3, ledger=ledger)
    assert ledger.total(SELECT).flops == pytest.approx(planned, rel=1e-9)
    assert planned <= allowance * budget.flops(world.task)
    assert planned > 0.7 * allowance * budget.flops(world.task)


def test_the_same_seed_gives_the_same_row(out):
    (first,) = (row for row in rows(out) if row["key"] == [str(N_SOURCES), 0, "thompson", 2.0])
    again = cell()
    (method,) = (m for m in again.methods if m.name == "thompson")
    second = {"key": first["key"], **again.run(method, 2.0)}
    first.pop("seconds"), second.pop("seconds")
    assert json.loads(json.dumps(second)) == first


def test_finished_cells_are_not_run_again(out, tmp_path, monkeypatch):
    monkeypatch.setattr(policy_gradient.Cell, "of", cell)
    lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
    missing = next(i for i, line in enumerate(lines) if '"thompson", 2.0]' in line)
    (tmp_path / "cells.jsonl").write_text("".join(lines[:missing] + lines[missing + 1 :]))
    ran = []
    run = Cell.run
    monkeypatch.setattr(Cell, "run", lambda *given: ran.append(given[1:]) or run(*given))
    main(["--out", str(tmp_path), *ARGUMENTS])
    assert [(method.name, allowance) for method, allowance in ran] == [("thompson", 2.0)]
    assert sorted(json.dumps(row["key"]) for row in rows(tmp_path)) == sorted(json.dumps(r["key"]) for r in rows(out))


def test_the_line_search_finds_the_planted_prefix(world):
    budget = Budget(PASSES, "epochs")
    selection = SignalPrefix(allowance=3.0).select(world.task, budget, seed=0, ledger=Ledger())
    used = selection.shares
    assert not any(used[f"s{i}"] for i in BAD)
    assert sum(share > 0 for share in used.values()) >= 2
    assert np.isclose(prefix_shares(4), [1, 1 / 2, 1 / 4, 1 / 8]).all()


def test_steps_that_cost_nothing_leave_the_trials_as_they_are(world):
    budget, found = Budget(PASSES, "epochs"), []
    for selector in (UnchargedSteps(allowance=3.0), PolicySearch(allowance=3.0, policy_steps=0)):
        ledger = Ledger()
        found.append((selector.select(world.task, budget, seed=0, ledger=ledger), ledger))
    assert [(key, e.flops) for key, e in found[0][1].entries.items()] == [
        (key, e.flops) for key, e in found[1][1].entries.items()
    ]
    assert set(found[1][0].source_probability.values()) == {0.5}
    assert np.ptp(list(found[0][0].source_probability.values())) > 0.5
    trials = sum(key[1].startswith("short runs") for key in found[0][1].entries) // 2
    assert trials > 1
    later, chosen_from = (found[0][0].notes[name] for name in ("later trials", "chosen"))
    assert sum(later) < found[0][0].notes["runs"]
    assert sum(later) >= trials
    assert chosen_from in ORIGINS


def test_the_mask_of_the_policy_is_what_its_probabilities_say(world):
    budget = Budget(PASSES, "epochs")
    selection = uncharged_steps(world.task, budget, 2.0).select(world.task, budget, seed=0, ledger=Ledger())
    made, p = by_policy(selection), selection.source_probability
    assert {name for name, share in made.shares.items() if share} == {name for name in p if p[name] > 0.5}
    assert made.selected.sum() == 40 * sum(x > 0.5 for x in p.values())
    assert not made.weighted


def test_the_origin_of_a_draw():
    first = {np.array([1.0, 0.0, 1.0]).tobytes()}
    draws = ([1.0, 0.0, 1.0], [1.0, 0.25, 1.0], [0.0, 1.0, 1.0])
    assert [origin(np.array(draw), first) for draw in draws] == list(ORIGINS)


class TestPosterior:
    def test_it_finds_planted_effects(self):
        rng = np.random.default_rng(0)
        effects = rng.normal(size=12)
        masks = np.concatenate([np.ones((1, 12)), rng.random((60, 12)) < 0.5]).astype(float)
        posterior = EffectPosterior(12)
        posterior.add(masks, 5.0 + (masks - 1) @ effects)
        large = np.abs(effects) > 0.3
        assert large.sum() > 6
        assert (np.sign(posterior.mean) == np.sign(effects))[large].all()

    def test_draws_have_its_mean_and_covariance(self):
        rng = np.random.default_rng(1)
        masks = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0]], dtype=float)
        posterior = EffectPosterior(3)
        posterior.add(masks, np.array([0.0, -1.0, 0.5]))
        draws = np.array([posterior.sample(rng) for _ in range(20_000)])
        x, variance = masks - 1, np.mean([0.0, 1.0, 0.25]) / (0.75 * 3)
        precision = (x.T @ x / (3 / 4) + np.eye(3)) / variance
        assert draws.mean(axis=0) == pytest.approx(posterior.mean, abs=0.02)
        assert np.cov(draws.T) == pytest.approx(np.linalg.inv(precision), abs=0.02)

    def test_a_trial_that_diverged_counts_as_the_worst(self):
        posterior = EffectPosterior(2)
        posterior.add(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([1.0, 2.0, np.nan]))
        assert posterior.mean[0] == pytest.approx(posterior.mean[1])
        assert (posterior.mean < 0).all()


class TestWorlds:
    @pytest.mark.parametrize("count", [20, 280])
    def test_kinds_come_in_their_shares_and_the_seed_decides(self, count):
        sources = sources_of(count, 0)
        assert len({s.name for s in sources}) == count
        noisy = sum(s.label_noise >= 0.5 for s in sources)
        assert noisy == pytest.approx(dict(KINDS)["noise of 50 to 90 %"] * count, abs=1)
        assert sum(map(is_right, sources)) == pytest.approx(count / 2, abs=1)
        assert sum(s.size for s in sources) == pytest.approx(4800, rel=0.02)
        assert sources == sources_of(count, 0)
        assert sources != sources_of(count, 1)


class TestReport:
    def test_the_page_says_what_was_measured(self, out):
        page = out / "page.md"
        main(["--out", str(out), "--results", str(page)])
        text, found = page.read_text(), Cells.read(out / "cells.jsonl")
        place = str(N_SOURCES)
        best = max(100 * row["accuracy"] for row in rows(out) if row["key"][0] == place and "accuracy" in row)
        regret, own = (values(place, (ONLINE, 0.0))[0] for values in (found.regret, found.accuracy))
        assert regret + own == pytest.approx(best)
        assert f"| {ONLINE} |  | {regret:.2f} ±" in text
        prose = [line for line in text.splitlines() if not line.startswith("|")]
        assert max(map(len, prose)) <= 120

    def test_a_verdict_is_that_of_the_interval(self):
        assert verdict([0.0, 0.0]) == "nothing (no run differs)"
        assert "from 0" in verdict([1.0, -0.8, 0.5])
        assert verdict([1.0, 1.1, 0.9]) == "+1.00 ± 0.25 points"

    def test_choices_and_differences_are_counted(self, tmp_path):
        def line(method, seed, accuracy, bits, select=0.5):
            row = {"key": ["4", seed, method, 1.0], "accuracy": accuracy, "select": select}
            packed = np.packbits(np.array(bits, dtype=bool)).tobytes()
            return json.dumps(row | {"chosen": base64.b64encode(packed).decode()})

        lines = [line(STEPS, 0, 0.8, [1, 1, 0, 0]), line(OFF, 0, 0.7, [1, 0, 0, 1])]
        lines += [
            line(STEPS, 1, 0.8, [1, 0, 0, 0]),
            line(OFF, 1, 0.75, [1, 0, 0, 0]),
            line(STEPS, 2, 0.9, [1, 1, 1, 1]),
        ]
        (tmp_path / "cells.jsonl").write_text("\n".join(lines))
        found = Cells.read(tmp_path / "cells.jsonl")
        assert found.seeds("4") == [0, 1], "the third seed is not finished"
        assert found.choices_differ("4", (STEPS, 1.0), (OFF, 1.0)) == {0: 0.5, 1: 0.0}
        assert found.difference("4", (STEPS, 1.0), (OFF, 1.0)) == pytest.approx({0: 10.0, 1: 5.0})
        assert found.regret("4", (OFF, 1.0)) == pytest.approx({0: 10.0, 1: 5.0})
        assert [found.not_bought("4", (name, 1.0)) for name in ("halving", OFF)] == [True, False]
