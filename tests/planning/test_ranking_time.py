"""The time of a ranking in a plan: a line through two small ones, which the whole one continues."""

from dataclasses import replace

import pytest

from baselines.less import Less
from cads import api
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT
from cads.errors import DataError
from cads.planning import methods, ranking_time
from cads.planning.methods import make_plan
from cads.planning.ranking_time import FEWEST, MOST, SECONDS, RankingTime, line_through, part_of, time_ranking
from cads.planning.timing import Timing
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

SOURCES = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]
RANKERS = ("less", "el2n", "loss", "rho", "embedding")
FAST = 1e15
"""FLOP/s with which no part takes too long."""


@pytest.fixture(scope="module")
def digits():
    return VisionConfig(hidden=16, n_pool=200, n_target=40, n_test=30, sources=SOURCES).build(TrainConfig(batch_size=8))


@pytest.fixture
def machine(monkeypatch):
    """A machine on which a ranking takes 2 s and 3 ns a FLOP, and the first one 5 s more."""
    ranked = []

    def seconds(ranker, task):
        ranked.append(len(task.pool))
        return 2.0 + 3e-9 * ranker.rank_plan(task).total(SELECT).flops + 5.0 * (len(ranked) == 1)

    monkeypatch.setattr(ranking_time, "_seconds", seconds)
    return ranked


def test_the_line():
    assert line_through(4.0, (10.0, 3.0), (30.0, 5.0)) == RankingTime(once=2.0 + 1.0, per_flop=0.1)
    assert line_through(4.0, (10.0, 3.0), (30.0, 5.0)).seconds(100.0) == pytest.approx(13.0)
    # No ranking takes less for more FLOPs: that is the noise of the machine.
    assert line_through(3.0, (10.0, 6.0), (30.0, 6.0)).per_flop == pytest.approx(0.2)
    assert line_through(1.0, (10.0, 1.0), (30.0, 9.0)).once == 0.0


@pytest.mark.parametrize("name", RANKERS)
def test_the_time_of_the_whole_is_on_the_line_of_its_parts(digits, machine, name):
    ranker = build_selector(name)
    measured = time_ranking(ranker, digits, FAST)
    flops = ranker.rank_plan(digits).total(SELECT).flops
    assert measured.seconds(flops) == pytest.approx(2.0 + 5.0 + 3e-9 * flops)
    assert machine == [50, 50, 200]


@pytest.mark.parametrize("name", RANKERS)
def test_parts_are_ranked(digits, name):
    measured = time_ranking(build_selector(name), digits, FAST)
    assert measured.per_flop > 0
    assert measured.once >= 0


def test_parts_have_as_large_a_share_of_the_target(digits):
    part = part_of(digits, 50)
    assert (len(part.pool), len(part.target), len(part.test)) == (50, 10, 30)
    assert (len(digits.pool), len(digits.target)) == (200, 40)
    assert len(part_of(digits, FEWEST).target) == 3
    assert len(part_of(digits, MOST).target) == 40


def test_the_larger_part_is_as_large_as_the_time_allows(digits, machine):
    ranker = build_selector("loss")
    for n in (200, 100, 50):
        machine.clear()
        flops = ranker.rank_plan(part_of(digits, n)).total(SELECT).flops
        assert time_ranking(ranker, digits, flops / SECONDS) is not None
        assert max(machine) == n
    assert time_ranking(ranker, digits, 1.0) is None


def test_what_would_not_be_its_own_is_not_timed(digits, machine, tmp_path, monkeypatch):
    assert time_ranking(Less(features=str(tmp_path)), digits, FAST) is None
    other = replace_proxy(digits)
    assert time_ranking(Less(), other, FAST) is None
    assert not machine
    monkeypatch.setattr(ranking_time, "_seconds", refuse)
    assert time_ranking(Less(), digits, FAST) is None


def replace_proxy(task):
    part = part_of(task, len(task.pool))
    part.proxy = task
    return part


def refuse(ranker, task):
    raise DataError("no")


def test_plans_continue_the_line_in_their_own_accounting(digits, machine):
    chosen = {name: build_selector(name) for name in ("less", "random", "full")}
    timing = Timing(FAST, "of steps timed here", 10.0, 0.0, 1e6, digits, 2.0)
    plan = make_plan(digits, Budget(2, "epochs"), chosen, timing=timing, strict=True, time_rankings=True)
    less, random, full = plan.methods
    own_flops = less.selection / 2
    assert less.seconds == pytest.approx(10.0 + less.training / FAST + 2.0 + 5.0 + 3e-9 * own_flops)
    assert (less.is_timed, random.is_timed, full.is_timed) == (True, False, False)
    assert len(machine) == 3, "what is free was ranked"


def test_a_plan_of_many_methods_times_what_takes_long(digits, machine):
    chosen = {name: build_selector(name) for name in ("less", "loss")}
    long = make_plan(digits, Budget(1, "epochs"), chosen, timing=Timing(1e9, "", 0.0, 0.0, 1e6, digits))
    assert not any(m.is_timed for m in long.methods)
    for start_up, expected in ((0.0, True), (1e6, False)):
        timing = Timing(FAST, "", start_up, 0.0, 1e6, digits)
        plan = make_plan(digits, Budget(1, "epochs"), chosen, timing=timing, time_rankings=True)
        assert all(m.is_timed is expected for m in plan.methods)


def test_the_table_shows_timed_rankings_without_a_mark(digits, monkeypatch):
    plan = api.plan(digits, "1 epochs", method="less")
    row = plan.methods[0]
    assert row.is_timed
    monkeypatch.setattr(methods, "time_ranking", lambda *_: None)
    assert not api.plan(digits, "1 epochs", method="less").methods[0].is_timed
    lines = [shown(replace(plan, methods=[replace(row, is_timed=timed)])) for timed in (True, False)]
    assert ["> " in line for line in lines] == [False, True]


def shown(plan):
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=80).print(plan.table())
    return next(line for line in text.getvalue().splitlines() if line.startswith("less"))
