"""Every block of code of the pages runs, or says why not; every link leads somewhere."""

from __future__ import annotations

import re

import pytest

from tests.support.pages import Block, blocks, fill_folder, pages, run_block
from tests.support.paths import ROOT

ELSEWHERE = {
    "README.md": "tests/cli/test_readme.py",
    "CONTRIBUTING.md": "tests/test_contributing.py",
    "docs/export.md": "tests/exports/test_export_page.py",
    "docs/own-images.md": "tests/tasks/vision/test_own_images_page.py",
    "docs/own-task.md": "tests/tasks/custom/test_own_task_page.py",
    "docs/trainers.md": "tests/integrations/test_transformers.py",
}
"""Pages whose blocks have a test of their own, with data of their own."""
HERE = [page for page in pages() if page not in ELSEWHERE and any(block.how is None for block in blocks(page))]


def name_of(page: str) -> str:
    return page.rsplit("/", 1)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_folder(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks(page):
        if block.how is None:
            run_block(block, namespace, page)


def test_the_pages_with_a_test_of_their_own_are_read_there():
    for page, test in ELSEWHERE.items():
        assert name_of(page) in (ROOT / test).read_text(), page


def test_blocks_that_another_test_runs_are_read_there():
    named = [(page, block) for page in pages() for block in blocks(page) if block.how == "run by"]
    assert named
    for page, block in named:
        assert name_of(page) in (ROOT / block.why).read_text(), page


def test_what_is_not_run_says_why():
    reasons = [block.why for page in pages() for block in blocks(page) if block.how == "not run"]
    assert len(reasons) > 3
    assert all(len(reason.split()) >= 3 for reason in reasons)


def test_a_command_that_is_none_of_cads_needs_a_reason():
    with pytest.raises(AssertionError, match="say why"):
        run_block(Block("sh", "tensorboard --logdir runs", None, None), {}, "page.md")


def test_indented_formulas_are_no_commands():
    assert blocks("docs/online.md") == []
    assert [block.kind for block in blocks("docs/export.md")] == ["sh"]


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if ":" not in target and "reference/commands.md" not in target and "reference/settings.md" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", pages())
def test_every_file_named_exists(page):
    for path in re.findall(r"`((?:cads|baselines|experiments|tests)/[\w/.-]*)`", (ROOT / page).read_text()):
        assert "NAME" in path or (ROOT / path).exists(), path


@pytest.mark.parametrize("page", pages())
def test_lines_are_at_most_120_characters(page):
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        assert len(line) <= 120 or line.startswith(("|", "cads ")), f"{page}:{number}"
