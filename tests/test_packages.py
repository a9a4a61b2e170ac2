"""The wheel and the sdist hold the package, and work where they are installed."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from typing import get_args

import pytest

import cads
from cads.launch.launcher import LauncherName
from cads.runtime.trackers import TrackerName
from tests.support.paths import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both packages, built from a copy of the tree; the wheel is built from the sdist."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "tests" / "docs", tree / "tests")
    for name in ("baselines", "cads", "docs", "experiments/examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tree / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
class TestPackages:
    def test_the_wheel_holds_the_packages_and_nothing_else(self, dist):
        (wheel,) = dist.glob("*.whl")
        assert wheel.name == f"cads_select-{cads.__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        data = {name.split(".data/", 1)[-1] for name in names if ".data/" in name}
        assert data == {"data/share/cads/glossary.md"}
        others = (name for name in names if ".dist-info" not in name and ".data/" not in name)
        assert {name.split("/")[0] for name in others} == {"cads", "baselines"}
        for folder, pattern in (("cads", "*.py"), ("baselines", "*.py"), ("cads", "*.j2"), ("cads", "py.typed")):
            files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
            assert files
            assert files <= set(names)

    def test_the_sdist_holds_licence_and_readme(self, dist):
        (sdist,) = dist.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            names = {name.split("/", 1)[-1] for name in archive.getnames()}
        assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.cfg", "cads/__init__.py"} <= names
        assert not {name.split("/")[0] for name in names} & {"tests", "experiments"}
        assert {name for name in names if name.startswith("docs/")} == {"docs/glossary.md"}

    def test_both_work_in_clean_environments(self, dist):
        """Dependencies are those of this environment, so that no network is needed; `make dist` fetches them."""
        script = ROOT / "tests" / "support" / "clean_install.py"
        command = [sys.executable, str(script), str(dist), "--borrow", sysconfig.get_path("purelib")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("installed and tried") == 2
        assert done.stdout.count(f"cads {cads.__version__}\n") == 2
        assert "Model, Selection and results: run" in done.stdout


def test_the_classifiers_name_each_python():
    versions = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert SETUP["options"]["python_requires"] == f">={versions[0]}"


def test_every_extra_is_explained():
    page = (ROOT / "docs" / "install.md").read_text()
    for extra in SETUP["options.extras_require"]:
        assert f"`{extra}`" in page, extra


def test_every_extra_that_a_message_names_exists():
    files = [file for folder in ("cads", "baselines", "experiments", "docs") for file in (ROOT / folder).rglob("*.*")]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    texts = [file.read_text() for file in files if file.suffix in (".py", ".md")]
    named = {extra for text in texts for extra in re.findall(r"cads-select\[([\w,-]+)\]", text)}
    in_words = {extra for text in texts for extra in re.findall(r"the extra `([\w-]+)`", text)}
    assert named
    assert in_words
    named |= in_words
    assert {extra for names in named for extra in names.split(",")} <= set(SETUP["options.extras_require"])


def test_extras_are_named_by_purpose():
    """A package gives its name to an extra only where users write that name: a tracker, or a launcher."""
    named_by_package = {
        extra
        for extra, requirements in SETUP["options.extras_require"].items()
        if any(re.split(r"[\[<>=]", line)[0] == extra for line in requirements.split())
    }
    assert named_by_package == {"wandb", "mlflow", "ray"}
    assert named_by_package <= {*get_args(TrackerName), *get_args(LauncherName)}


def test_the_checks_build_the_pages():
    """Without MkDocs `tests/docs/test_site.py` is skipped; what `make test` installs has it."""
    extras = SETUP["options.extras_require"]
    assert extras["docs"].strip() in extras["dev"]
    assert {"mkdocs-material", "mkdocstrings", "mkdocs-jupyter"} <= set(re.findall(r"^[\w-]+", extras["docs"], re.M))
