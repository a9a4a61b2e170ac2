"""A plan for 10^9 examples: costs of models from closed forms, costs of other steps from the measured rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cads.accounting.budget import Budget
from cads.accounting.units import duration, size
from cads.planning.ccds import PUBLISHED
from cads.planning.methods import Plannable, make_plan
from cads.recipe import TrainConfig
from cads.selectors.online.selector import Cads
from cads.tasks.language.shapes import LanguageShapes
from experiments.scaling_steps import WHOLE_UPDATE, Row

N = 10**9
"""Examples of the plan."""
PLANNED = 10**6
"""Examples for which `cads plan` computes FLOPs; all stages but those on the target are linear in them."""
MODELS = Path(__file__).parent / "configs" / "models"
TOKENS = 512
"""Tokens of an example."""
GPU_FLOPS = 0.4 * 312e12
"""FLOP/s of one GPU: 40 % of the peak of an A100 in bfloat16."""
GPUS, CORES, MEMORY = 8, 64, 512 * 2**30
"""GPUs, CPU cores and bytes of memory of one machine."""
HOURS = 24.0
"""Hours within which selection is to end."""
TEXT_BYTES, ID_BYTES = 2000, 20
"""Bytes of an example on disk: of its text in Arrow, and of its id."""
SHARD = 2**24
"""Examples of a shard, which is what a machine processes at a time."""


@dataclass(frozen=True)
class Line:
    """One way to select from `N` examples.

    Attributes:
        method: its name. flops: of the selection. hours: on one GPU. machines: that are needed to end it in `HOURS`.
        share: FLOPs of selection over those of one pass of training over all examples.
    """

    method: str
    flops: float
    hours: float
    machines: int
    share: float


def llama_shapes() -> LanguageShapes:
    """Llama-2 7B with LoRA trained on `PLANNED` examples, scored by itself; BERT-base as sentence encoder."""
    llama = str(MODELS / "llama-2-7b.json")
    return LanguageShapes(
        model=llama, selector_model=llama, embedding_model=str(MODELS / "bert-base.json"), tokens=TOKENS,
        n_pool=PLANNED,
    )  # fmt: skip


@lru_cache(maxsize=1)
def on_gpus() -> tuple[Line, ...]:
    """The costs of selection by models according to `cads plan`, the cheapest first."""
    task = llama_shapes().meta(TrainConfig(batch_size=128, precision="bf16"))
    task.accounting = "analytic"
    methods: dict[str, Plannable] = {"cads": Cads(), **PUBLISHED}
    plan = make_plan(task, Budget(1, "epochs"), methods, flops_per_second=GPU_FLOPS)
    lines = []
    for m in plan.methods:
        flops = m.selection * N / PLANNED
        hours = flops / GPU_FLOPS / 3600
        lines.append(Line(m.method, flops, hours, math.ceil(hours / HOURS / GPUS), m.selection / plan.flops))
    return tuple(sorted(lines, key=lambda line: line.flops))


def on_cores(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """Steps without a model: (step, engine, core hours for `N` examples, bytes on a machine that does the step)."""
    engines = {
        ("texts", "BM25"): ("two passes over Arrow shards; document frequencies of shards add up", SHARD),
        ("scores", "stream to Parquet"): ("`cads.scoring.score_files.ScoreWriter`, a row group at a time", 0),
        ("scores", "the best 10,000"): ("`cads.scoring.top_k.TopK` over score files; lists of shards merge", 0),
        ("policy", WHOLE_UPDATE): ("one policy a shard, each with its share of the cap", SHARD),
        ("pool", "content hashes of all examples"): ("a pass over each shard", SHARD),
        ("selection", "save"): ("one Selection a shard", SHARD),
    }
    steps = []
    for (section, step), (engine, n_in_memory) in engines.items():
        step_rows = [r for r in rows if (r.section, r.step) == (section, step)]
        if step_rows:
            r = max(step_rows, key=lambda r: r.n)
            memory = r.extra / r.n * n_in_memory if n_in_memory else float(r.extra)
            steps.append((f"{section}: {step}", engine, r.seconds / r.n * N / 3600, memory))
    return steps


def markdown(rows: Sequence[Row]) -> str:
    """The plan as Markdown."""
    lines = [
        f"## A plan for {N:,} examples",
        "",
        f"Computed by the script. Model: Llama-2 7B with LoRA (rank 128), examples of {TOKENS} positions, analytic "
        f"accounting by `cads plan` for {PLANNED:,} examples and one pass of training, times {N // PLANNED:,} (stages "
        f"on the target do not grow, so this is an upper bound). A GPU does {GPU_FLOPS:.3g} FLOP/s, a machine has "
        f"{GPUS} of them, {CORES} cores and {size(MEMORY)}; selection is to end in {HOURS:.0f} hours.",
        "",
        f"Engine: Arrow shards of {SHARD:,} examples on shared storage ({size(N * TEXT_BYTES)} of text at "
        f"{TEXT_BYTES:,} bytes each), {math.ceil(N / SHARD)} of them; each machine scores its shards into Parquet "
        f"({size(N * (8 + ID_BYTES))} of ids and scores in all), one pass with `cads.scoring.top_k.TopK` finds what is "
        "kept, and training reads that alone. No step holds all ids or scores of the pool in one memory.",
        "",
        "| selection | FLOPs | of one pass of training | GPU hours | machines for a day |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in on_gpus():
        lines.append(
            f"| {line.method} | {line.flops:.2e} | {line.share:.1%} | {line.hours:,.0f} | {max(line.machines, 1):,} |"
        )
    lines += [
        "",
        "Steps without a model, from the largest pool measured here (one core of this machine), linear in the pool:",
        "",
        "| step | engine | core hours | machines for a day | memory on one machine |",
        "| --- | --- | --- | --- | --- |",
    ]
    for step, engine, hours, memory in on_cores(rows):
        machines = max(1, math.ceil(hours / HOURS / CORES))
        lines.append(f"| {step} | {engine} | {hours:.3g} ({duration(3600 * hours)}) | {machines} | {size(memory)} |")
    lines += [
        "",
        "A run of `cads select` in one process holds the ids and a few numbers for each example of its pool. In shards "
        "(`docs/clusters.md`) a process holds one file, and merging holds what is kept; BM25 adds up the document "
        "frequencies of all shards.",
    ]
    return "\n".join(lines) + "\n"
