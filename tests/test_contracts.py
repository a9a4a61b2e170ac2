"""The import contracts of pyproject.toml hold, and a planted import that breaks one is caught."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytest.importorskip("importlinter")
PLANTED = {
    "upward": ("cads/data/planted.py", "import cads.training.loop", "cads.data is not allowed to import cads.training"),
    "from a new package": ("cads/attic/__init__.py", "", "attic"),
    "a rival": ("cads/search/planted.py", "import baselines.random", "cads is not allowed to import baselines"),
    "an experiment": ("baselines/planted.py", "import experiments.worlds", "baselines is not allowed to import"),
    "a circle": ("cads/data/hashing.py", "import cads.data.pool", "cads.data"),
}


def lint(folder):
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for package in ("cads", "baselines", "experiments"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_contracts_hold(sources):
    done = lint(sources)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_import_is_caught(sources, what):
    name, line, message = PLANTED[what]
    file = sources / name
    before = file.read_text() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{before or ''}\n{line}\n")
    try:
        done = lint(sources)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
        if what == "from a new package":
            file.parent.rmdir()
    assert done.returncode == 1
    assert message in done.stdout.replace("\n", " ")
