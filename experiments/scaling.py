"""Growth of time and memory with the size of the pool, from 10^5 to 10^7 examples, and a plan for 10^9.

    python -m experiments.scaling --out experiments/results/scaling.md

Each section is measured at each size in its own process, one at a time, on one thread. The rows are written as JSON
beside the table. `--render` makes table, figure and plan again from that file. Rows measured anew replace the old ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cads.accounting.units import size
from experiments.scaling_plan import markdown as plan_markdown
from experiments.scaling_steps import SECTIONS, WHOLE_UPDATE, Row

SIZES: dict[str, tuple[int, ...]] = {
    "policy": (10**5, 10**6, 10**7),
    "pool": (10**5, 10**6, 10**7),
    "selection": (10**5, 10**6, 10**7),
    "scores": (10**5, 10**6, 10**7),
    "cads": (10**5, 10**6),
    "texts": (10**5, 10**6),
}
"""Sizes of the pool in examples, by section."""
MAX_TIME_RATIO, MAX_BYTES = 2.0, 40.0
"""Limits for an update of a policy: the largest time per example over the smallest, over all sizes; and the bytes per
example beyond the parameters."""
TITLES = {
    "policy": "Policy: one Bernoulli draw, its log-probability and score, and a projected step",
    "pool": "Pool of images 8x8 in a mapped `.npy` file, and the batches drawn from it",
    "selection": "A Selection: ranking, files",
    "scores": "Scores streamed to Parquet, and the best of them by external top-k",
    "cads": "`cads` end to end: 8x8 images in a mapped file, an MLP of 32 hidden units, a budget of one pass",
    "texts": "BM25, and embeddings, of texts of 10 to 60 words",
}
NOTES = {
    "policy": "The best of nine times; memory as numpy allocates it, beyond the parameters.",
    "pool": "Files that are mapped count in the peak as far as they have been read, and can be dropped at any time.",
    "cads": "The training of the final model included; see the ledger's FLOPs.",
    "texts": "Words follow Zipf's law (exponent 1.1, 200,000 words). The encoder of the embedding is a layer of 64 "
    "random features of words hashed to 512 places, since a sentence encoder (MiniLM) would take hours on this "
    "machine: what is measured is everything around it.",
}
FIGURE_STEPS = {
    ("policy", WHOLE_UPDATE): "policy update",
    ("pool", "content hashes of all examples"): "hash of an image",
    ("selection", "save"): "selection, save",
    ("selection", "load"): "selection, load",
    ("scores", "the best 10,000"): "external top-k",
    ("cads", "select"): "cads",
    ("texts", "BM25"): "BM25",
    ("texts", "embedding"): "embedding",
}
"""Steps that the figure shows, with their labels in it."""


def measure(section: str, n: int) -> list[Row]:
    """Measure one section at one size, in its own process on one thread."""
    command = [sys.executable, "-m", "experiments.scaling", "--measure", section, "--n", str(n)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    completed = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {completed.returncode}:\n{completed.stderr}")
    return [Row(**record) for record in json.loads(completed.stdout.splitlines()[-1])]


def markdown(rows: Sequence[Row], command: str) -> str:
    """The text of the results file."""
    parts = [
        "# Growth with the pool\n",
        f"    {command}\n",
        f"One thread of a machine with {os.cpu_count()} cores ({platform.machine()}), other processes beside it; each "
        "section at each size in a process of its own, whose modules take some 650 MB of the peak. Extra: bytes at the "
        "peak of a step beyond what was in memory before it.\n",
        f"![growth]({FIGURE})\n",
        _verdict(rows),
    ]
    for section, title in TITLES.items():
        section_rows = [r for r in rows if r.section == section]
        if section_rows:
            parts += [f"## {title}\n", _table(section_rows)]
            if section in NOTES:
                parts.append(NOTES[section] + "\n")
    return "\n".join([*parts, plan_markdown(rows)])


FIGURE = "scaling.png"
"""Name of the figure, beside the table."""


def _verdict(rows: Sequence[Row]) -> str:
    updates = [r for r in rows if (r.section, r.step) == ("policy", WHOLE_UPDATE)]
    if not updates:
        return ""
    per_example = [r.seconds / r.n for r in updates]
    low, high, extra = 1e9 * min(per_example), 1e9 * max(per_example), max(r.extra / r.n for r in updates)
    return (
        f"An update of a policy takes {low:.0f} to {high:.0f} ns an example, a factor of {high / low:.2f} "
        f"({'within' if high <= MAX_TIME_RATIO * low else 'NOT within'} {MAX_TIME_RATIO:g}), and {extra:.1f} bytes an "
        f"example beyond the parameters ({'below' if extra < MAX_BYTES else 'NOT below'} {MAX_BYTES:g}).\n"
    )


def _table(rows: Sequence[Row]) -> str:
    lines = ["| step | examples | seconds | each, us | extra | extra each, bytes | peak | FLOPs |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for step in dict.fromkeys(r.step for r in rows):
        for r in sorted((r for r in rows if r.step == step), key=lambda r: r.n):
            flops = f"{r.flops:.3g}" if r.flops else ""
            lines.append(
                f"| {r.step} | {r.n:,} | {r.seconds:.3g} | {r.seconds / r.n * 1e6:.3g} | {size(r.extra)} | "
                f"{r.extra / r.n:.3g} | {size(r.peak)} | {flops} |"
            )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw time and extra memory per example against the size of the pool."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from cads.study.report.static import AXES_HEIGHT, PNG_DPI, RC, WIDTH
    from cads.study.report.style import FAINT, MARKERS, SERIES

    with mpl.rc_context(RC):
        figure = Figure(figsize=(2 * WIDTH, AXES_HEIGHT + 1), layout="constrained")
        panels = figure.subplots(1, 2)
        for i, ((section, step), label) in enumerate(FIGURE_STEPS.items()):
            step_rows = sorted((r for r in rows if (r.section, r.step) == (section, step)), key=lambda r: r.n)
            if not step_rows:
                continue
            style = {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % len(MARKERS)], "linewidth": 1.4}
            sizes = [r.n for r in step_rows]
            panels[0].plot(sizes, [r.seconds / r.n * 1e6 for r in step_rows], label=label, **style)
            panels[1].plot(sizes, [max(r.extra / r.n, 1e-2) for r in step_rows], **style)
        for axes, label in zip(panels, ("microseconds an example", "extra bytes an example"), strict=True):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("examples")
            axes.set_ylabel(label)
            axes.grid(color=FAINT, alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(path, dpi=PNG_DPI)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file for the table; figure and rows are written beside it")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="what to measure")
    parser.add_argument(
        "--sizes", nargs="+", type=int, help="sizes of the pool in examples; default: by section, up to 10^7"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing: read the rows beside --out")
    parser.add_argument("--measure", choices=list(SECTIONS), help="measure one section in this process; print its rows")
    parser.add_argument("--n", type=int, default=10**5, help="with --measure: size of the pool in examples")
    args = parser.parse_args(argv)
    if args.measure:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            rows = SECTIONS[args.measure](args.n, Path(folder))
        print(json.dumps([asdict(row) for row in rows]))
        return 0
    if args.out is None:
        parser.error("--out is missing: name the table, such as experiments/results/scaling.md")
    stored = args.out.with_suffix(".json")
    rows = [Row(**record) for record in json.loads(stored.read_text())] if stored.exists() else []
    if not args.render:
        for section in args.sections:
            for n in args.sizes or SIZES[section]:
                measured = measure(section, n)
                print(f"{section} {n:,}: {sum(r.seconds for r in measured):.1f} s", flush=True)
                rows = [r for r in rows if (r.section, r.n) != (section, n)] + measured
                stored.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    draw(rows, args.out.with_name(FIGURE))
    args.out.write_text(markdown(rows, f"python -m experiments.scaling --out {shlex.quote(str(args.out))}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
