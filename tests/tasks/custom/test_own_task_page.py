"""docs/own-task.md is true: its examples run, and its table of methods names them all."""

from __future__ import annotations

import re

import pytest

from cads.registry import SELECTORS, names
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "own-task.md").read_text()
REGRESSION, TABLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_regression_runs_and_selection_pays(capsys):
    exec(compile(REGRESSION, "docs/own-task.md", "exec"), {"__name__": "page"})
    errors = re.search(r"squared error: ([\d.]+) with cads, ([\d.]+) on everything", capsys.readouterr().out)
    assert errors is not None
    assert float(errors[1]) < float(errors[2])


def test_the_regression_is_short():
    lines = [line for line in REGRESSION.splitlines() if line.strip()]
    assert len(lines) <= 25


def test_the_table_of_datasets_runs(capsys):
    exec(compile(TABLE, "docs/own-task.md", "exec"), {"__name__": "page"})
    assert "'a':" in capsys.readouterr().out


@pytest.mark.parametrize("method", names(SELECTORS))
def test_the_page_says_what_each_method_does_without_classes(method):
    section = PAGE[PAGE.index("## With and without classes") : PAGE.index("## Stop and go on")]
    assert f"`{method}`" in section
