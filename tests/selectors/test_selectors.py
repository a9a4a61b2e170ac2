"""What every selector of the entry-point group owes its caller, one suite for all of them."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

import cads.registry
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, TRAIN, Ledger
from cads.data.pool import Pool
from cads.errors import BudgetError, ConfigError
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, build_selector, names, selector_class
from cads.scoring.ranker import Ranker
from cads.search.base import Search
from cads.selection import Selection
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.final import train

NEEDED = {"source": {"name": "clean"}}
"""Options without which a selector cannot be made."""
FREE = ("full", "joint", "random", "source", "target-only")
"""They look at nothing, so they must cost nothing."""
READERS = ("bm25", "embedding", "ppl")
"""They read the pool, and by default train nothing."""
RIDERS = ("cads", "cads-s", "cads-e")
"""They train the final model, so they charge for training too; what they read follows from the budget."""
TEXT_ONLY = ("bm25",)
"""They have nothing to read in images."""
TEXT_TOO = ("embedding", "less", "loss", "ppl")
"""They are made for texts, and apply to images."""
BUDGET = Budget(16, "epochs")
SOURCES = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]


@pytest.fixture(scope="module")
def tasks(texts):
    """One of images, and one of texts with the same sources."""
    config = VisionConfig(hidden=16, n_pool=80, n_target=40, n_test=30, sources=SOURCES)
    return {"images": config.build(TrainConfig(batch_size=8)), "texts": texts(batch_size=8)}


@pytest.fixture
def kind():
    """Of the task, where a test does not say."""
    return "images"


@pytest.fixture
def task(tasks, kind):
    """The task that the selector under test is tried on."""
    return tasks[kind]


@dataclass
class Chosen:
    """What one call left behind."""

    selection: Selection
    ledger: Ledger
    budget: Budget


def choose(task, name, budget=BUDGET, seed=0, **options):
    ledger = Ledger()
    selector = build_selector(name, {**NEEDED.get(name, {}), **options})
    return Chosen(selector.select(task, budget, seed=seed, ledger=ledger), ledger, budget)


every = pytest.mark.parametrize("name", names(SELECTORS))
everywhere = pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "images") for name in names(SELECTORS) if name not in TEXT_ONLY]
    + [(name, "texts") for name in (*TEXT_ONLY, *TEXT_TOO)],
)


@pytest.fixture(scope="module")
def made():
    """What each selector chose, by its name and the kind of the task."""
    return {}


@pytest.fixture
def chosen(made, task, kind):
    """One call of each selector, made when it is first asked for."""

    def get(name):
        if (name, kind) not in made:
            made[name, kind] = choose(task, name)
        return made[name, kind]

    return get


def test_the_promised_selectors_are_installed():
    assert {*FREE, *RIDERS, "search"} <= set(names(SELECTORS))


@everywhere
def test_selection_is_of_the_pool(task, chosen, name):
    selection = chosen(name).selection
    assert selection.ids.equals(task.pool.ids)
    assert selection.pool_hash == task.pool.content_hash
    assert selection.sources.to_pylist() == [task.pool.source_names[s] for s in task.pool.sources]
    assert selection.method == name
    assert selection.seed == 0
    assert selection.budget == BUDGET
    assert selection.selected.any() or selection.target_fraction == 1
    if selection.source_probability:
        assert set(selection.source_probability) == set(task.pool.source_names)


@everywhere
def test_it_is_read_back_as_it_was(chosen, name, tmp_path):
    selection = chosen(name).selection
    loaded = Selection.load(selection.save(tmp_path / "s"))
    assert loaded.table().equals(selection.table())
    assert loaded._header() == selection._header()


@everywhere
def test_every_flop_is_charged_to_selection(chosen, name):
    made = chosen(name)
    assert {phase for phase, _ in made.ledger.entries} <= ({SELECT, TRAIN} if name in RIDERS else {SELECT})
    assert made.selection.ledger.to_json() == made.ledger.to_json()
    spent = made.ledger.total(SELECT)
    assert (spent.flops == 0) == (name in FREE)
    assert name in RIDERS or (spent.usages == 0) == (name in (*FREE, *READERS))


@pytest.mark.parametrize("allowance", [0.0, 0.05, 0.5, 1.0, 2.75])
def test_selection_stays_within_its_allowance(task, allowance):
    made = choose(task, "search", allowance=allowance)
    assert made.ledger.total(SELECT).flops <= allowance * BUDGET.flops(task) * (1 + 1e-9)


@everywhere
@pytest.mark.parametrize("amount", [0.2, 1, 16])
def test_a_budget_that_counts_selection_covers_both(task, name, amount):
    budget = Budget(amount, "epochs", count_selection=True)
    selector = build_selector(name, NEEDED.get(name))
    left = budget.flops(task) - selector.plan(task, budget).total(SELECT).flops
    if isinstance(selector, Ranker) and left < 8 * task.costs.per_usage(task.pool, 8):
        ledger = Ledger()
        with pytest.raises(BudgetError, match=r"nothing is left to train with|does not buy one step"):
            selector.select(task, budget, seed=0, ledger=ledger)
        assert not ledger.entries
        return
    made = choose(task, name, budget)
    outcome = train(task, made.selection, budget, seed=0)
    spent = outcome.ledger.total(SELECT).flops + outcome.ledger.total(TRAIN).flops
    assert outcome.ledger.total(SELECT).flops == made.ledger.total(SELECT).flops
    assert spent <= budget.flops(task) * (1 + 1e-9)


@everywhere
def test_training_alone_stays_within_a_budget_that_does_not(task, chosen, name):
    outcome = train(task, chosen(name).selection, BUDGET, seed=0)
    assert 0 < outcome.ledger.total(TRAIN).flops <= BUDGET.flops(task)


@everywhere
def test_same_seed_same_bytes(task, chosen, name, tmp_path):
    chosen(name).selection.save(tmp_path / "one")
    np.random.default_rng().random(3)
    choose(task, name).selection.save(tmp_path / "two")
    for file in ("selection.json", "scores.parquet"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def rearranged(task, order):
    """The task with the rows of its file in another order; sources are numbered as they occur, as readers do it."""
    sources = np.array(task.pool.source_names)[task.pool.sources[order]]
    names = list(dict.fromkeys(sources.tolist()))
    codes = np.array([names.index(s) for s in sources])
    other = copy.copy(task)
    other.pool = Pool(task.pool.ids.take(order), task.pool.examples.take(order), codes, names)
    return other


@everywhere
@pytest.mark.parametrize("arrangement", ["shuffled", "sorted"])
def test_a_permuted_pool_changes_nothing(task, chosen, name, arrangement):
    order = np.random.default_rng(1).permutation(len(task.pool))
    if arrangement == "sorted":
        order = np.argsort(-task.pool.sources, kind="stable")
    before, after = chosen(name), choose(rearranged(task, order), name)
    ids, others = (made.selection.table().sort_by("id") for made in (before, after))
    assert ids["id"].equals(others["id"])
    assert ids["source"].to_pylist() == others["source"].to_pylist()
    assert before.selection.source_probability.keys() == after.selection.source_probability.keys()
    assert ids["selected"].equals(others["selected"])
    if issubclass(selector_class(name), Search) or name in RIDERS:
        for column in ("score", "probability"):
            assert others[column].to_numpy() == pytest.approx(ids[column].to_numpy(), abs=1e-9)
        assert after.selection.source_probability == pytest.approx(before.selection.source_probability)
        assert after.ledger.total().flops == pytest.approx(before.ledger.total().flops)
        return
    for column in ids.column_names:
        assert column == "source" or ids[column].equals(others[column])
    assert before.selection.source_probability == after.selection.source_probability


@every
def test_unknown_options_are_refused(name):
    with pytest.raises(ConfigError, match=r"\['colour'\] of method .* are unknown: it has"):
        build_selector(name, {**NEEDED.get(name, {}), "colour": 3})


@every
@pytest.mark.parametrize("options", [3, "x", [1]])
def test_options_that_are_no_mapping_are_refused(name, options):
    with pytest.raises(ConfigError, match="must map names to values"):
        build_selector(name, options)


class Untouched:
    """A task on which nothing may be computed."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        if name in ("model", "losses", "metrics", "objective"):
            raise AssertionError(f"{name} was used before the budget was refused")
        return getattr(self._task, name)


@everywhere
@pytest.mark.parametrize("count_selection", [False, True])
def test_less_than_one_step_is_refused_before_compute(task, name, count_selection):
    assert task.costs.optimizer_step >= 0  # counted here, since counting may build a model
    step = task.costs.per_usage(task.pool, 8) * 8
    budget = Budget(0.9 * step, count_selection=count_selection)
    with pytest.raises(BudgetError, match="raise the budget or lower batch_size"):
        choose(Untouched(task), name, budget)


@pytest.mark.parametrize(
    ("name", "kind", "reason"), [("bm25", "images", "has no text"), ("el2n", "texts", "has no classes")]
)
@pytest.mark.parametrize("count_selection", [False, True])
def test_a_selector_that_does_not_apply_says_why_before_compute(tasks, name, kind, reason, count_selection):
    refusing, ledger = Untouched(tasks[kind]), Ledger()
    assert tasks[kind].costs.optimizer_step >= 0
    with pytest.raises(ConfigError, match=reason):
        build_selector(name).select(refusing, replace(BUDGET, count_selection=count_selection), seed=0, ledger=ledger)
    assert not ledger.total().flops


class TestNames:
    def test_an_unknown_method_is_refused_with_the_nearest(self):
        with pytest.raises(ConfigError, match=r"'cads-z' is unknown; did you mean 'cads-.'\? Installed: best-of"):
            build_selector("cads-z")

    def test_nothing_is_near(self):
        with pytest.raises(ConfigError, match=r"'qqq' is unknown\. Installed:"):
            build_selector("qqq")

    @pytest.mark.parametrize("name", [3, None, ["full"]])
    def test_no_name(self, name):
        with pytest.raises(ConfigError, match="must be a name"):
            selector_class(name)

    @pytest.mark.parametrize("installed", [object, partial(int), "a name"])
    def test_what_is_no_dataclass_is_refused(self, installed, monkeypatch):
        monkeypatch.setattr(cads.registry, "selector_class", lambda name: installed)
        with pytest.raises(ConfigError, match=r"'other' is installed as .* no dataclass"):
            build_selector("other")

    def test_a_missing_option_is_named(self):
        with pytest.raises(ConfigError, match=r"'source' cannot be made.*'name'"):
            build_selector("source")


class TestRandom:
    def test_subsets_are_nested_over_budgets_and_sizes(self, task):
        budgets = [Budget(b, "epochs") for b in (0.2, 0.5, 1, 2, 3, 5)]
        chains = [
            [choose(task, "random", b).selection.selected for b in budgets],
            [choose(task, "random", fraction=f).selection.selected for f in (0.02, 0.1, 0.3, 0.7, 1.0)],
        ]
        for chain in chains:
            for smaller, larger in pairwise(chain):
                assert smaller.sum() < larger.sum()
                assert (smaller <= larger).all()
            assert chain[-1].all()

    @pytest.mark.parametrize(("epochs", "passes", "kept"), [(3, 4.0, 60), (1, 1.0, 80), (1, 4.0, 20), (100, 4.0, 80)])
    def test_as_many_as_the_budget_pays_for(self, task, epochs, passes, kept):
        selection = choose(task, "random", Budget(epochs, "epochs"), epochs=passes).selection
        assert selection.selected.sum() == pytest.approx(kept, abs=1)

    def test_seeds_differ_and_are_fair(self, task):
        share = np.mean([choose(task, "random", seed=s, fraction=0.5).selection.selected for s in range(60)], axis=0)
        assert abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(60)

    @pytest.mark.parametrize("options", [{"fraction": 0}, {"fraction": 1.1}, {"epochs": 0}, {"fraction": "half"}])
    def test_bad_options(self, options):
        with pytest.raises(ConfigError):
            build_selector("random", options)


def test_source_selects_exactly_that_source(task, chosen):
    selection = chosen("source").selection
    assert (selection.selected == (np.array(selection.sources) == "clean")).all()
    assert selection.mixture() == {"clean": 1.0, "noisy": 0.0}
    with pytest.raises(ConfigError, match=r"'dirty' is no source.*\['clean', 'noisy'\]"):
        build_selector("source", {"name": "dirty"}).select(task, BUDGET, seed=0, ledger=Ledger())


def test_full_joint_and_target_only_select_what_they_say(chosen):
    assert chosen("full").selection.selected.all()
    assert chosen("full").selection.target_fraction == 0
    assert chosen("joint").selection.selected.all()
    assert chosen("joint").selection.target_fraction == 0.3
    assert not chosen("target-only").selection.selected.any()
    assert chosen("target-only").selection.target_fraction == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_joint_needs_a_share_between_0_and_1(share):
    with pytest.raises(ConfigError, match="target_fraction"):
        build_selector("joint", {"target_fraction": share})


@pytest.mark.parametrize("name", ["search", "halving"])
def test_training_with_the_target_changes_the_training_alone(task, chosen, name):
    plain, joint = chosen(name).selection, choose(task, name, target_fraction=0.25).selection
    assert (plain.target_fraction, joint.target_fraction) == (0, 0.25)
    assert np.array_equal(plain.selected, joint.selected)
    with pytest.raises(ConfigError, match=r"target_fraction = 1"):
        build_selector(name, {"target_fraction": 1})
