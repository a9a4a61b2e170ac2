"""The site builds without a warning; what is made from the code is whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

import cads
from cads.cli.main import COMMANDS
from cads.registry import SELECTORS, TASKS, names
from tests.support.paths import ROOT

pytest.importorskip("mkdocs")
for plugin in ("material", "mkdocstrings", "mkdocs_jupyter"):
    pytest.importorskip(plugin)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def section(page: str, title: str) -> str:
    return page.split(f"\n{title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_every_command_and_its_settings_are_listed(hooks):
    page = hooks.commands_page()
    for command in COMMANDS:
        assert "| setting | takes | default |" in section(page, f"## cads {command}")
    assert "| `--budget` | a number or text | `5 epochs` |" in section(page, "## cads train")
    assert "`--budget`" not in section(page, "## cads check"), "it does nothing there"


def test_every_kind_and_method_has_its_settings(hooks):
    page = hooks.settings_page()
    for kind in names(TASKS):
        assert "| `model` | text |" in section(page, f"## The task of kind `{kind}`: `task`")
    for method in names(SELECTORS):
        assert f"### `{method}`" in page
    less = page.split("### `less`\n")[1].split("### ")[0]
    assert "| `warmup_share` | a number | `0.05` | Share of the pool" in less
    assert "| `optimizer` | adamw, sgd | `adamw` |" in section(page, "## The recipe: `train`")


def test_public_names_without_docstring_or_place_are_found(hooks):
    pages = [(ROOT / "docs" / page).read_text() for page in hooks.REFERENCE]
    assert hooks.undocumented(pages) == []
    without = [page.replace("::: cads.train\n", "") for page in pages]
    assert hooks.undocumented(without) == ["cads.train is public and is not in the reference"]


def test_members_without_a_line_are_found(hooks, tmp_path):
    griffe = pytest.importorskip("griffe")
    lines = ['"""One.', "", "Attributes:", "    a: first.", '"""', "a: int = 0", "b: int = 0", "def c(self): ..."]
    code = "class A:\n" + "\n".join(f"    {line}" for line in lines)
    (tmp_path / "toy.py").write_text(code)
    owner = griffe.load("toy", search_paths=[str(tmp_path)])["A"]
    missing = [name for name, member in owner.members.items() if hooks._needs_docstring(member, owner)]
    assert missing == ["b", "c"]


def test_links_are_made_to_fit(hooks, caplog):
    text = "[a](docs/start.md) [b](CONTRIBUTING.md#words) [c](cads/task.py) ![d](experiments/results/demo.png)"
    fitted = hooks._fit_links(text, "README.md", "index.md")
    assert fitted == "[a](start.md) [b](contributing.md#words) c (`cads/task.py`) ![d](results/demo.png)"
    assert hooks._fit_links("[x](../CHANGELOG.md)", "docs/start.md", "start.md") == "[x](changelog.md)"
    assert caplog.text == ""
    hooks._fit_links("[y](nowhere.md)", "README.md", "index.md")
    assert "nowhere.md, which does not exist" in caplog.text


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    python = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    extending = (tmp_path / "site" / "reference" / "extending" / "index.html").read_text()
    for name in set(cads.__all__) - {"__version__"}:
        assert re.search(rf'id="cads\.(?:[\w.]+\.)?{name}"', python + extending), name
    for page in ("start", "which", "methods", "results", "results/online", "contributing", "notebooks/chats"):
        assert (tmp_path / "site" / page / "index.html").exists()
    for file in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', file.read_text()), file
