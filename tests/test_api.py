"""The public names: loaded when they are used, documented, and equal to the commands."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from collections import Counter

import numpy as np
import pytest
import yaml

import cads
from baselines.random import Random
from cads.cli.main import main
from cads.errors import BudgetError, ConfigError
from cads.selection import Selection
from cads.tasks.vision.config import VisionConfig
from tests.support.paths import ROOT

FUNCTIONS = ("plan", "select", "train", "export")
WITHOUT_BUDGET = ("export",)
CLASSES = (
    *("Batch", "Budget", "CadsError", "DatasetTask", "Ledger", "Pool", "Selection", "Selector", "Task", "TensorTask"),
    "TrainConfig",
)
CONFIG = {
    "task": {"hidden": 16, "n_pool": 80, "n_target": 30, "n_test": 30, "sources": [{"name": "a"}, {"name": "b"}]},
    "train": {"batch_size": 8},
    "budget": "2 epochs",
    "tensorboard": False,
    "progress": False,
}


@pytest.fixture(scope="module")
def task():
    config = {**CONFIG["task"]}
    from cads.tasks.vision.synthetic_sources import SyntheticSource

    config["sources"] = [SyntheticSource(**source) for source in config["sources"]]
    return VisionConfig(**config).build(cads.TrainConfig(**CONFIG["train"]))


def test_the_public_names_are_these():
    assert set(cads.__all__) == {*FUNCTIONS, *CLASSES, "__version__"}
    assert set(cads.__all__) <= set(dir(cads))
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", cads.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cads.nothing  # noqa: B018


def test_no_two_public_classes_share_a_name():
    files = [file for package in ("cads", "baselines") for file in (ROOT / package).rglob("*.py")]
    names = [
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(names) > 200
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_a_star_import_gives_them():
    code = "from cads import *; print(Task, select)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "cads.task.Task" in done.stdout


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_every_public_name_has_a_docstring(name):
    document = inspect.getdoc(getattr(cads, name))
    assert document
    assert len(document.split()) >= 5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_types_units_results_and_errors(name):
    function = getattr(cads, name)
    document, hints = inspect.getdoc(function), typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    assert set(parameters) | {"return"} == set(hints)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in document
    for parameter in parameters:
        assert re.search(rf"^    {parameter}: ", document, re.MULTILINE), parameter
    assert ("FLOPs" in document) == (name not in WITHOUT_BUDGET)


@pytest.mark.parametrize("name", ["Batch", "Pool", "Selection"])
def test_classes_of_arrays_say_their_shapes(name):
    assert re.search(r"shape \(", inspect.getdoc(getattr(cads, name)))


@pytest.mark.parametrize("name", CLASSES)
def test_methods_are_documented(name):
    cls = getattr(cads, name)
    for method, member in vars(cls).items():
        if not method.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod | property)):
            assert inspect.getdoc(member), f"{name}.{method}"


def test_python_gives_what_the_commands_write(task, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    assert main(["select", str(file), "--method", "random", "--seed", "3", "--out", str(tmp_path / "run")]) == 0
    assert main(["train", str(file), "--selection", str(tmp_path / "run"), "--seed", "3"]) == 0
    selection = cads.select(task, "2 epochs", method="random", seed=3)
    assert selection.content_hash == Selection.load(tmp_path / "run").content_hash
    results = yaml.safe_load((tmp_path / "run" / "train" / "results.json").read_text())
    trained = cads.train(task, "2 epochs", selection=selection, seed=3)
    assert trained.metrics == results["metrics"]
    assert cads.train(task, "2 epochs", method="random", seed=3).metrics == trained.metrics


def test_a_plan_names_what_it_costs(task):
    plan = cads.plan(task, "4 epochs", method=["random", "search"], flops_per_second=1e9)
    assert [m.method for m in plan.methods] == ["random", "search"]
    ledger = cads.Ledger()
    cads.select(task, "4 epochs", method="search", ledger=ledger)
    assert plan.methods[1].selection == pytest.approx(ledger.total("select").flops, rel=0.1)
    assert cads.plan(task, "4 epochs", method="random", flops_per_second=1e9).methods[0].selection == 0


def test_options_and_budgets_are_passed_on(task):
    assert cads.select(task, "2 epochs", method="random", fraction=0.25).selected.sum() == 20
    counted = cads.select(task, "2 epochs", method=Random(fraction=0.5), count_selection=True)
    assert counted.budget == cads.Budget(2, "epochs", count_selection=True)
    same = cads.select(task, counted.budget, method=Random(fraction=0.5))
    assert same.budget.count_selection
    np.testing.assert_array_equal(same.selected, counted.selected)


def test_bad_calls_are_refused(task):
    with pytest.raises(BudgetError, match="does not parse"):
        cads.select(task, "five epochs")
    with pytest.raises(ConfigError, match="did you mean"):
        cads.select(task, "2 epochs", method="randon")
    with pytest.raises(ConfigError, match="are unknown"):
        cads.select(task, "2 epochs", method="random", share=0.5)
    with pytest.raises(ConfigError, match="a selector that is made"):
        cads.select(task, "2 epochs", method=Random(), fraction=0.5)
    selection = cads.select(task, "2 epochs", method="full")
    with pytest.raises(ConfigError, match="a selection is given"):
        cads.train(task, "2 epochs", selection=selection, fraction=0.5)
