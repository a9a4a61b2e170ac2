"""docs/export.md names every form, and its commands run."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from cads.exports.export import Form
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text()


@pytest.mark.parametrize("form", get_args(Form))
def test_the_table_names_each_form(form):
    assert re.search(rf"^\| .*`{form}`", PAGE, re.MULTILINE)


def test_the_command_for_trl_is_one_of_its_own():
    parser = pytest.importorskip("trl.scripts.sft").make_parser()
    (command,) = re.findall(r"^    trl sft (.*)$", PAGE, re.MULTILINE)
    flags = [word.removeprefix("--") for word in command.split() if word.startswith("--")]
    known = {action.dest for action in parser._actions}
    assert set(flags) - {"config"} <= known
