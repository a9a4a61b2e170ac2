"""docs/methods.md has a section for each method, with a formula, its cost and its source."""

from __future__ import annotations

import re

import pytest

from cads.registry import SELECTORS, names
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
SECTIONS = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_there_are_no_others():
    assert sorted(SECTIONS) == sorted(names(SELECTORS))


@pytest.mark.parametrize("method", names(SELECTORS))
def test_each_has_a_paragraph_a_formula_a_cost_and_a_source(method):
    paragraph, formula, facts = SECTIONS[method].strip().split("\n\n", 2)
    assert len(paragraph.split()) >= 3
    assert formula.startswith("    ")
    assert re.match(r"- \*Cost\*: \S.*\n(?:  .*\n)?- \*Source\*: \S", facts)


def test_every_method_is_in_one_of_the_papers_or_ours():
    papers = (ROOT / "docs" / "papers.md").read_text()
    for method, section in SECTIONS.items():
        number = re.search(r"arXiv (\d{4}\.\d{5})", section)
        assert number is None or number[1] in papers, method
