"""From files and a budget to a trained model, as a newcomer would: from the wheel, in a clean environment.

    python -m build --outdir dist
    python -m experiments.ten_minutes dist --model MODEL --results experiments/results/ten-minutes.md

Three files of questions are written (jargon and small talk as the pool, definitions of computing terms as the target),
and one to test on. Then `COMMANDS` are given, one after another, and the page holds what they print. MODEL is any
causal model; the dependencies are those of this environment, so that nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from cads.errors import CadsError
from cads.runtime.atomic_files import whole_file
from experiments.corpora import read_corpus

LONGEST = 24
"""Words of the longest answer."""
PARTS = (
    ("jargon.jsonl", "jargon", 0, 400),
    ("small-talk.jsonl", "chat", 0, 400),
    ("val.jsonl", "foldoc", 0, 120),
    ("test.jsonl", "foldoc", 120, 300),
)
"""File, corpus, and the first and last of its pairs."""
COMMANDS = (
    "cads init jargon.jsonl small-talk.jsonl val.jsonl test.jsonl --model {model}",
    "cads check cads.yaml",
    'cads plan cads.yaml --budget "3 epochs"',
    'cads train cads.yaml --budget "3 epochs" --out run',
    "cads export run --to jsonl --output chosen.jsonl",
)


def write_files(folder: Path) -> None:
    """Write the files of a newcomer: a question and its answer a line.

    Raises:
        ConfigError: if a corpus is not installed.
    """
    for name, corpus, first, last in PARTS:
        pairs = read_corpus(corpus, LONGEST, {}).pairs[first:last]
        lines = [json.dumps({"prompt": pair.prompt, "response": pair.response}) for pair in pairs]
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8")


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel into a new environment, and return the folder of its commands."""
    venv.create(environment)
    base = {"base": str(environment), "platbase": str(environment)}
    borrowed = Path(sysconfig.get_path("purelib", "posix_prefix", base)) / "borrowed.pth"
    borrowed.write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    flags = ["--no-deps", "--no-index", "--ignore-installed", "--disable-pip-version-check"]
    subprocess.run([*pip, *flags, str(wheel.resolve())], check=True)
    return environment / "bin"


def run(command: str, folder: Path, commands: Path) -> tuple[str, float]:
    """What a command prints, and how long it takes, seconds.

    Raises:
        SystemExit: if it fails, with what it printed.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    outside = {**kept, "PATH": f"{commands}:{os.environ['PATH']}", "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{command}\n{done.stdout}")
    return done.stdout, time.perf_counter() - started


def page(parts: Sequence[tuple[str, str, float]], command: str) -> str:
    """The transcript: each command, what it printed, and its time."""
    total = sum(seconds for _, _, seconds in parts)
    lines = [
        "# From files to a trained model",
        f"    {command}",
        "Three files, a file to test on, a model, and five commands of the wheel in a clean environment: "
        f"{total:.0f} s of machine time. The rest of the ten minutes is reading.",
    ]
    for words, printed, seconds in parts:
        lines += [f"## {words}", f"{seconds:.0f} s", f"```\n{printed.strip()}\n```"]
    return "\n\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the job, and write its transcript."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder of the wheel")
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal model")
    parser.add_argument("--results", type=Path, help="Markdown file for the transcript")
    options = parser.parse_args(argv)
    (wheel,) = options.dist.glob("*.whl")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "mine")
        folder.mkdir()
        try:
            write_files(folder)
        except CadsError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        (folder / "model").symlink_to(options.model.resolve(), target_is_directory=True)
        commands = install(wheel, Path(place, "environment"))
        parts = []
        for template in COMMANDS:
            command = template.format(model="model")
            printed, seconds = run(command, folder, commands)
            print(f"$ {command}\n{printed}")
            parts.append((command, printed.replace(place, "~"), seconds))
    if options.results:
        given = shlex.join(["python", "-m", "experiments.ten_minutes", *(sys.argv[1:] if argv is None else argv)])
        whole_file(options.results, page(parts, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
