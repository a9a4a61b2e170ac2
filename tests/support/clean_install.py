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
from collections.abc import Sequence
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
    ("glossary", "probe"),
    ("train", "--pool", "photos", "--model", "mlp", "--budget", "10 epochs", "--out", "run", "--progress", "false"),
)
"""What is tried, in this order; of the sdist the first alone."""


def main() -> None:
    """Try each package of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--borrow", type=Path, help="site-packages that hold all dependencies")
    settings = parser.parse_args()
    wheels, sdists = ([*settings.folder.glob(name)] for name in ("*.whl", "*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        sys.exit(f"{settings.folder} holds {len(wheels)} wheels and {len(sdists)} sdists: there must be one of each")
    with tempfile.TemporaryDirectory() as place:
        offline = ["--no-index", "--no-build-isolation"] if settings.borrow else []
        packages = try_package(wheels[0], Path(place, "wheel"), COMMANDS, settings.borrow, offline)
        # Dependencies are large: the second environment has those of the first.
        try_package(sdists[0], Path(place, "sdist"), COMMANDS[:1], settings.borrow or packages, offline)


def try_package(
    package: Path, place: Path, commands: Sequence[Sequence[str]], borrow: Path | None, flags: Sequence[str]
) -> Path:
    """Install one package into an environment in `place`, and run the commands.

    Args:
        borrow: where the dependencies are; None to install them. flags: further ones of pip.

    Returns:
        where the environment has its packages.

    Raises:
        SystemExit: with what was said, if one of them fails.
    """
    environment = place / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment), "platbase": str(environment)}))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    if borrow is not None:
        (site / "borrowed.pth").write_text(f"{borrow}\n")
        install += ["--no-deps", "--ignore-installed"]
    _run([*install, *flags, package.resolve()], place)
    found = "import cads, baselines; print(cads.__file__); print(baselines.__file__)"
    for file in _run([python, "-c", found], place).split():
        if environment.resolve() not in Path(file).resolve().parents:
            sys.exit(f"{package.name}: {file} is not of the package")
    _run([python, "-c", IMAGES], place)
    for words in commands:
        print("cads", *words)
        print(_run([environment / "bin" / "cads", *words], place))
    print(f"{package.name}: installed and tried")
    return site


def _run(words: list[str | Path], place: Path) -> str:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=place, env=outside, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
