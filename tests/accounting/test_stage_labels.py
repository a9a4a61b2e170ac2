"""Stages in words: every stage that the code charges has a label, and tags keep TensorBoard's groups."""

from __future__ import annotations

import ast
import io
import re

import pytest
from rich.console import Console

from cads.accounting.ledger import PHASES, SELECT, Ledger
from cads.accounting.stage_labels import stage_label, stage_tag
from cads.search.fidelity import Rung
from tests.support.paths import ROOT

CHANGED = {
    "theta": "target model",
    "theta, with the pool": "target model, with the pool",
    "R": "losses of the target model",
    "losses of theta": "losses of the target model",
    "u": "reference model",
    "u, measuring": "reference model, measuring",
    "l*": "losses of the reference model",
    "losses of u": "losses of the reference model",
    "policy": "policy updates",
    "pass": "pass over the pool",
    "guard": "trials of the guard",
    "guard, measuring": "trials of the guard, measuring",
    "errors": "error norms",
    "plain steps": "inner training, plain steps",
    "unrolled steps": "inner training, unrolled steps",
    "short runs, C/16": "trials, 1/16 of the budget",
    "short runs, C/16, measuring": "trials, 1/16 of the budget, measuring",
    "short runs, C/12.8": "trials, 1/12.8 of the budget",
    "short runs, C/1.5e+03": "trials, 1/1500 of the budget",
    "short runs, C/1": "trials, all of the budget",
    "short runs, C/1, measuring": "trials, all of the budget, measuring",
}
UNCHANGED = (
    *("final model", "test", "choices", "as published", "short runs", "short runs, C/x", "measuring", ""),
    *("warm-up", "fine-tuning", "scores", "embeddings", "similarities", "clusters", "index and scores", "projections"),
    *("gradients", "target gradients", "pool gradients"),
    *("holdout model", "holdout losses", "pool model", "pool losses"),
    *("timed", "replicas", "truth", "probe", "probe of the initial model", "speed test"),
    "likeness to the target",
    "validation",
    *("features", "features of the target", "folds", "probabilities", "utilities", "excess losses", "curvature"),
    *("metrics of the trainer", "validation by the trainer"),
)
CALLS = {
    **dict.fromkeys(("charge", "timed", "FitTarget", "ScorePool", "Trials", "check_reference"), 1),
    **dict.fromkeys(("Steps", "TrainOnPool", "TrainOnTarget", "ReadPool", "Priced"), 0),
}
"""Functions that are given the name of a stage, and where among their arguments."""


@pytest.mark.parametrize("stage", [*CHANGED, *UNCHANGED])
def test_stages_are_shown_in_words(stage):
    assert stage_label(stage) == CHANGED.get(stage, stage)
    assert stage_label(stage_label(stage)) == stage_label(stage)
    assert "/" not in stage_tag(stage)


@pytest.mark.parametrize("divisor", [1, 1.28, 2, 12.8, 16, 128, 999.6, 1234, 1e7])
def test_the_fidelity_of_a_rung_is_parsed(divisor):
    stage = Rung(1 / divisor, 1.0, 1.0, 2).stage
    shared = "all" if divisor == 1 else f"1/{float(f'{divisor:.3g}'):.10g}"
    assert stage_label(stage) == f"trials, {shared} of the budget"
    assert stage_tag(stage) == f"trials, {shared.replace('/', '-')} of the budget"


def test_every_stage_that_is_charged_is_listed():
    charged = {stage for folder in ("cads", "baselines", "experiments") for stage in _stages(folder)}
    assert charged >= {"theta", "R", "plain steps", "final model", "holdout model", "warm-up", "clusters"}
    assert charged <= {*CHANGED, *UNCHANGED}


def test_the_table_of_a_ledger_shows_labels_and_its_json_the_names():
    ledger = Ledger()
    for stage in ("theta", "short runs, C/16, measuring"):
        ledger.charge(SELECT, stage, 1.0)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(ledger.table())
    text = console.export_text()
    assert "target model" in text
    assert "trials, 1/16 of the budget, measuring" in text
    assert "theta" not in text
    assert [record["stage"] for record in ledger.to_json()] == ["theta", "short runs, C/16, measuring"]


def test_the_glossary_explains_what_tables_show():
    text = (ROOT / "docs" / "glossary.md").read_text()
    explained = set(re.findall(r"\*\*(.+?)\*\*", text))
    explained |= {word for terms in explained for word in terms.split(", ")}
    shown = {stage_label(stage) for stage in {*_stages("cads"), *_stages("baselines")}}
    shown = {re.sub(r"^trials, .*", "trials", label).removesuffix(", measuring") for label in shown} - {""}
    assert shown <= explained
    for phase in PHASES.values():
        assert f"`{phase}`" in text
    for word in ("FLOP", "Share", "Token", "Answer tokens", "Policy probability", "Share of training", "Regret"):
        assert word in explained
    assert "`examples`" in text


def _stages(folder):
    """Names of stages in the calls of all modules of a folder: literals, and constants of the same module."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        module = ast.parse(path.read_text())
        constants = dict(pair for node in module.body if isinstance(node, ast.Assign) for pair in _assigned(node))
        for node in ast.walk(module):
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "stage"]
            place = CALLS.get(getattr(node.func, "attr", getattr(node.func, "id", "")))
            if place is not None:
                given += node.args[place : place + 1]
            for value in given:
                name = constants.get(value.id) if isinstance(value, ast.Name) else getattr(value, "value", None)
                if isinstance(name, str):
                    yield name


def _assigned(node):
    """The names and the constants of `A = "a"` or `A, B = "a", "b"`."""
    target, value = node.targets[0], node.value
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    for name, constant in zip(names, values, strict=False):
        if isinstance(name, ast.Name) and isinstance(constant, ast.Constant):
            yield name.id, constant.value
