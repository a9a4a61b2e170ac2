"""Install the wheel and the sdist of a folder into clean environments, and try the wheel's commands there.

python tests/support/clean_install.py dist                       # dependencies from the index
python tests/support/clean_install.py dist --borrow SITE         # dependencies from the packages of another environment
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

IMAGES = """
import numpy as np
from pathlib import Path
from PIL import Image

rng = np.random.default_rng(0)
for label in ("cat", "dog"):
    folder = Path("photos") / label
    folder.mkdir(parents=True)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
"""
COMMANDS = (
    ("--version",),
    ("init", "photos"),
    ("train", "cads.yaml", "--budget", "10 epochs", "--task.model", "mlp", "--out", "run", "--progress", "false"),
    ("export", "run", "--to", "files", "--output", "chosen.txt"),
)
"""What is tried, in this order."""


def main() -> None:
    """Try each package of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--borrow", type=Path, help="site-packages that hold all dependencies")
    settings = parser.parse_args()
    packages = sorted(settings.folder.glob("*.whl")) + sorted(settings.folder.glob("*.tar.gz"))
    if {package.suffix for package in packages} != {".whl", ".gz"}:
        sys.exit(f"{settings.folder} holds no wheel or no sdist")
    for package in packages:
        with tempfile.TemporaryDirectory() as place:
            try_package(package.resolve(), Path(place), settings.borrow)
        print(f"{package.name}: installed and tried")


def try_package(package: Path, place: Path, borrow: Path | None) -> None:
    """Install one package into an environment in `place`, and run the commands.

    Raises:
        CalledProcessError: if one of them fails.
    """
    environment = place / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    if borrow is not None:
        here = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
        Path(here, "borrowed.pth").write_text(f"{borrow}\n")
        install += ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    _run([*install, package], place)
    found = "import cads, baselines; print(cads.__file__); print(baselines.__file__)"
    for file in _run([python, "-c", found], place).split():
        if environment.resolve() not in Path(file).resolve().parents:
            sys.exit(f"{package.name}: {file} is not of the package")
    _run([python, "-c", IMAGES], place)
    for words in COMMANDS if package.suffix == ".whl" else COMMANDS[:1]:
        _run([environment / "bin" / "cads", *words], place)
    if package.suffix == ".whl" and not (place / "run" / "model.safetensors").exists():
        sys.exit(f"{package.name}: `cads train` wrote no model")


def _run(words: list[str | Path], place: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=place, env=outside, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
