"""The page on the engines: kills and comparisons, the growth curve, the large pool, and a plan for 10^9 texts."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from cads.accounting.units import size
from experiments.scaling_plan import CORES, GPUS, HOURS, N, on_gpus

LEAST_HOURS = 1.0
"""Hours of a GPU below which a way to select is not listed."""
GPU_PRICE, CORE_PRICE = 2.0, 0.04
"""Dollars for an hour of a GPU, and of a core; both are assumptions."""


def markdown(results: Mapping[str, Sequence[Mapping[str, Any]]], command: str) -> str:
    """The page."""
    parts = [
        "# Pools in shards on Ray, SLURM and processes\n",
        f"    {command}\n",
        f"A machine with {os.cpu_count()} cores ({platform.machine()}), other processes beside it. Every step is a "
        "command `cads select CONFIG --out DIR` with `--shard i/n`, `--merge` or `--launcher NAME`. The method is "
        "BM25, in two rounds: each file is surveyed for the words of the target, and scored when all are surveyed.\n",
        *(_chaos(results["chaos"]) if results["chaos"] else []),
        *(_growth(results["growth"]) if results["growth"] else []),
        *(_large(results["large"][0]) if results["large"] else []),
        *(_plan(results["large"][0], results["growth"][0]) if results["large"] and results["growth"] else []),
    ]
    return "\n".join(parts)


def _chaos(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    total = sum(sum(row["kills"].values()) for row in rows)
    runs, equal = sum(row["runs"] for row in rows), sum(row["equal"] for row in rows)
    kinds = sorted({kind for row in rows for kind in row["kills"]})
    lines = [
        "## Kills\n",
        f"{total} times a process was killed by SIGKILL at a random moment: a worker, the driver, a node's raylet "
        "with its object store, or the S3 server. The pool is 64 files in S3 (moto's server on loopback). Ray has two "
        "nodes (`ray.cluster_utils.Cluster`); SLURM is submitit's local executor. The experiment starts driver, node "
        "and the server again; workers are the launcher's to replace.\n",
        f"{equal} of {runs} runs gave the bytes of one undisturbed process (`selection.json`, `scores.parquet`, "
        f"`rows.parquet`; digest {rows[0]['digest']}). {sum(row['whole'] for row in rows)} of {runs} have exactly one "
        "published part a file.\n",
        f"| launcher | {' | '.join(kinds)} | runs | equal bytes | one part a file | seconds |",
        "| --- |" + " --- |" * (len(kinds) + 4),
    ]
    for row in rows:
        counts = " | ".join(str(row["kills"].get(kind, 0)) for kind in kinds)
        lines.append(
            f"| {row['launcher']} | {counts} | {row['runs']} | {row['equal']} | {row['whole']} | {row['seconds']:.0f} |"
        )
    return [*lines, ""]


def _growth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Growth with the number of shards\n",
        f"Shards of {rows[0]['documents'] // rows[0]['shards']:,} texts, one after another in one process, then "
        "merged. "
        "Seconds are those of the processors, imports included; memory is the peak of the process.\n",
        "| shards | texts | scoring, CPU s | a text, ms | peak | merging, CPU s | peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        score, merge = row["score"], row["merge"]
        lines.append(
            f"| {row['shards']} | {row['documents']:,} | {score['cpu']:.1f} | "
            f"{1e3 * score['cpu'] / row['documents']:.2f} | {size(score['peak'])} | {merge['cpu']:.1f} | "
            f"{size(merge['peak'])} |"
        )
    return [*lines, ""]


def _large(row: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {row['documents']:,} texts in {row['files']} shards\n",
        f"One process and {row['files']} shards give {'the same bytes' if row['same'] else 'OTHER BYTES'} (digest "
        f"{row['digest']}).\n",
        "| step | seconds | CPU s | peak of a process |",
        "| --- | --- | --- | --- |",
    ]
    for step in row["steps"]:
        own = f"{step['cpu']:.0f} | {size(step['peak'])}" if step["cpu"] is not None else "of several processes | "
        lines.append(f"| {step['step']} | {step['seconds']:.0f} | {own} |")
    return [*lines, ""]


def _plan(row: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    score, merge = row["steps"][0], row["steps"][1]
    # What the smallest pool takes as well, such as imports, does not grow.
    growing = (score["cpu"] - small["score"]["cpu"]) / (row["documents"] - small["documents"])
    core_hours = growing * N / 3600
    merge_hours = merge["cpu"] / row["documents"] * N / 3600
    lines = [
        f"## A plan for {N:,} texts\n",
        "On paper, not run. Scoring by models is what `cads plan` says for Llama-2 7B with LoRA and 512 tokens a text "
        f"(`experiments/results/scaling.md` has the assumptions); it is to end in {HOURS:.0f} hours on machines of "
        f"{GPUS} GPUs at ${GPU_PRICE:.2f} an hour and GPU. BM25 and merging are the rates measured above, linear in "
        f"the texts, on machines of {CORES} cores at ${CORE_PRICE:.2f} an hour and core. Merging is one process.\n",
        "| step | hours | machines for a day | price |",
        "| --- | --- | --- | --- |",
    ]
    for line in (line for line in on_gpus() if line.hours >= LEAST_HOURS):
        machines = max(1, math.ceil(line.hours / HOURS / GPUS))
        lines.append(f"| {line.method} | {line.hours:,.0f} of a GPU | {machines:,} | ${line.hours * GPU_PRICE:,.0f} |")
    machines = max(1, math.ceil(core_hours / HOURS / CORES))
    lines.append(f"| bm25 | {core_hours:,.0f} of a core | {machines:,} | ${core_hours * CORE_PRICE:,.0f} |")
    merge_time = f"at most {merge_hours:,.1f} of a core: imports took most of what was measured"
    lines.append(f"| merge | {merge_time} | 1 | ${merge_hours * CORE_PRICE:,.2f} |")
    return [*lines, ""]
