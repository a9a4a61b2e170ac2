"""What training costs on a GPU: utilisation, the online method, features of gradients, memory, and one whole run.

    python -m experiments.gpu --out experiments/results/gpu-run.md
    python -m experiments.gpu --size 1b
    python -m experiments.gpu --tiny

Two tasks: ResNet-18 on images of the shape of CIFAR-10, and a Llama with LoRA (`--size`: 135m or 1b) in bf16. Weights
and data are random and made on the spot; no network is used. Without a GPU it says so and ends well. `--tiny` runs all
of it with tiny models on any machine, which tests the code and measures nothing. After `--minutes` no further part is
begun, and what is left out is named.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from baselines.gradients.per_example import PerExample
from baselines.gradients.projection import PROJECTED, make_projection
from cads.accounting.budget import Budget
from cads.accounting.ledger import TRAIN, Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.data.streams import ShuffledStream
from cads.data.token_batches import device_type
from cads.data.training_batches import BatchStream
from cads.planning.memory import training_memory
from cads.planning.plan import duration, size
from cads.recipe import TrainConfig
from cads.registry import build_selector
from cads.runtime.atomic_files import whole_file
from cads.selectors.online.schedule import OnlineConstants
from cads.selectors.online.selector import Cads
from cads.task import Task
from cads.training import final
from cads.training.device_settings import device_settings, prepare_device
from cads.training.optimizers import build_optimizer
from cads.training.precision import autocast
from cads.training.trainer import Trainer
from experiments.gpu_cases import GpuCase, batches_on, language_case, vision_case

ROUNDS = 3
"""Measurements of what is compared, in turn; the median counts."""
MINUTES = 7.0
PLAIN_BAR, ONLINE_BAR, FEATURES_BAR = 0.9, 1.03, 0.9
"""Least speed of `cads` over the plain loop, most time of an online step over a plain one, least rate of features over
plain forward and backward passes."""
COMPILED_STEPS = 10
"""Steps of the compiled loop that are timed."""


class WholeOnline(Cads):
    """`cads` without its first phase: every step draws, weighs and learns."""

    def constants(self, task: Task) -> OnlineConstants:
        """Those of the task, without passes over the target first."""
        return replace(super().constants(task), first_passes=0.0)


@dataclass(frozen=True)
class GpuMeasurement:
    """One measured number.

    Attributes:
        case: what was trained. what: was measured. value: with its unit. bar: what is asked for, or empty.
        met: whether the bar is met; None without a bar, or where nothing is measured.
    """

    case: str
    what: str
    value: str
    bar: str = ""
    met: bool | None = None

    def line(self) -> str:
        """The line in Markdown."""
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return f"| {self.case} | {self.what} | {self.value} | {self.bar} | {verdict} |"


class Bench:
    """Measures one case on one device.

    Args:
        case: what is trained. device: where. judged: whether bars are held against the numbers.
    """

    def __init__(self, case: GpuCase, device: torch.device, *, judged: bool) -> None:
        self.case, self.device, self._judged = case, device, judged
        self.task, self.steps = case.task, case.steps

    @property
    def step_flops(self) -> float:
        """FLOPs of a step of plain training."""
        size = self.task.recipe.batch_size
        return self.task.costs.per_usage(self.task.pool, size) * size + self.task.costs.optimizer_step

    def finding(self, what: str, value: str, bar: str = "", met: bool | None = None) -> GpuMeasurement:
        """A finding of this case."""
        return GpuMeasurement(self.case.name, what, value, bar, met if self._judged else None)

    def speed(self) -> list[GpuMeasurement]:
        """A step of `cads` beside one of the plain loop, and the utilisation of both."""
        times = np.array([(self.plain_seconds(), self.trainer_seconds()) for _ in range(ROUNDS)])
        plain, cads = np.median(times, axis=0)
        ratio = float(np.median(times[:, 0] / times[:, 1]))
        peak = matmul_flops_per_second(str(self.device), self.task.recipe.precision)
        return [
            self.finding("step of a plain loop", f"{1000 * plain:.2f} ms"),
            self.finding("step of `cads`, no selection", f"{1000 * cads:.2f} ms"),
            self.finding("utilisation of the plain loop", f"{self.step_flops / plain / peak:.1%} of {peak:.3g} FLOP/s"),
            self.finding("utilisation of `cads`", f"{self.step_flops / cads / peak:.1%}"),
            self.finding("speed over the plain loop", f"{ratio:.3f}", f">= {PLAIN_BAR}", ratio >= PLAIN_BAR),
        ]

    def compiled(self) -> list[GpuMeasurement]:
        """Whether `torch.compile` would pay: the steps after which the plain loop has won back the compilation."""
        plain = self.plain_seconds()
        started = time.perf_counter()
        compiled = self.plain_seconds(compiled=True, steps=COMPILED_STEPS)
        spent = time.perf_counter() - started - COMPILED_STEPS * compiled
        saved = plain - compiled
        after = f"pays after {spent / saved:,.0f} steps" if saved > 0 else "never pays"
        return [self.finding("compiled plain loop", f"{1000 * compiled:.2f} ms; compiling {spent:.0f} s, {after}")]

    def online(self) -> list[GpuMeasurement]:
        """A step of `cads` that selects, beside one that trains on target and pool."""
        joint = build_selector("joint", {"target_fraction": 0.3})
        times = np.array([(self.run_seconds(joint), self.run_seconds(WholeOnline())) for _ in range(ROUNDS)])
        ratio = float(np.median(times[:, 1] / times[:, 0]))
        return [
            self.finding("step of joint training", f"{1000 * np.median(times[:, 0]):.2f} ms"),
            self.finding("step of `cads`", f"{1000 * np.median(times[:, 1]):.2f} ms"),
            self.finding("time of a step over joint", f"{ratio:.3f}", f"<= {ONLINE_BAR}", ratio <= ONLINE_BAR),
        ]

    def features(self) -> list[GpuMeasurement]:
        """Projected gradients of examples a second, beside plain forward and backward passes."""
        model = self.task.model(0).to(self.device)
        gradients = PerExample(self.task, model, precision=_passes(self.task))
        sketch = make_projection(gradients.sizes, self._dimension(gradients), 0, self.device)
        batches = batches_on(self.case, self.device, 4)

        def features() -> None:
            for batch in batches:
                into = sketch.empty(len(batch))
                gradients.each(batch, lambda name, start, g: sketch.add(name, g, into[start : start + len(g)]))  # noqa: B023

        def plain() -> None:
            for batch in batches:
                with autocast(self.task.recipe.precision, self.device):
                    loss = self.case.loss(model, batch)
                loss.backward()
                model.zero_grad(set_to_none=True)

        features()
        plain()
        times = np.array([(self._timed(features), self._timed(plain)) for _ in range(ROUNDS)])
        rate = sum(len(batch) for batch in batches) / float(np.median(times[:, 0]))
        ratio = float(np.median(times[:, 1] / times[:, 0]))
        note = "" if gradients.batched else ", one by one"
        return [
            self.finding("features", f"{rate:,.3g} examples/s in {sketch.dimension} dimensions{note}"),
            self.finding("rate over plain passes", f"{ratio:.3f}", f">= {FEATURES_BAR}", ratio >= FEATURES_BAR),
        ]

    def memory(self) -> list[GpuMeasurement]:
        """Peak memory of training, beside that of the plan."""
        planned = training_memory(self.task).total
        if self.device.type != "cuda":
            return [self.finding("peak memory", f"planned {size(planned)}; not measured on {self.device}")]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._fit(3)
        peak = torch.cuda.max_memory_allocated() - before
        return [
            self.finding("peak memory", f"{size(peak)}, planned {size(planned)}: {planned / peak:.2f} of what was used")
        ]

    def whole_run(self, folder: Path) -> list[GpuMeasurement]:
        """`cads train` from start to end."""
        from cads.cli.main import main as cads

        words = ["train", str(self.case.config), "--out", str(folder), "--progress", "false", "--tensorboard", "false"]
        started = time.perf_counter()
        status = cads(words)
        took = time.perf_counter() - started
        return [replace(self.finding("`cads train`", f"status {status}, {duration(took)}"), met=status == 0)]

    def plain_seconds(self, *, compiled: bool = False, steps: int | None = None) -> float:
        """Seconds of a step of the loop that a user of PyTorch would write, all batches being on the device already."""
        steps = self.steps if steps is None else steps
        model: nn.Module = self.task.model(0).to(self.device).train()
        optimizer = build_optimizer(self.task.recipe, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        batches = batches_on(self.case, self.device, 4)
        call: Any = torch.compile(model) if compiled else model

        def loop(count: int) -> None:
            for i in range(count):
                with autocast(self.task.recipe.precision, self.device):
                    loss = self.case.loss(call, batches[i % len(batches)])
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, self.task.recipe.clip_norm or float("inf"))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        loop(3)
        return self._timed(lambda: loop(steps)) / steps

    def trainer_seconds(self) -> float:
        """Seconds of a step of the trainer: what a longer run takes longer, over its further steps."""
        (short, n_short), (long, n_long) = (self._fit(n) for n in (self.steps, 3 * self.steps))
        return (long - short) / (n_long - n_short)

    def run_seconds(self, selector: Any) -> float:
        """Seconds of a training step of a whole run, as for `trainer_seconds`."""
        seconds, steps = [], []
        for count in (2 * self.steps, 4 * self.steps):
            budget, ledger = Budget(count * self.step_flops * 1.05, "FLOPs"), Ledger()
            selection = selector.select(self.task, budget, seed=0, ledger=ledger)
            trained = final.train(self.task, selection, budget, seed=0).ledger.total(TRAIN)
            seconds.append(trained.seconds)
            steps.append(trained.usages / self.task.recipe.batch_size)
        return (seconds[1] - seconds[0]) / (steps[1] - steps[0])

    def _fit(self, steps: int) -> tuple[float, int]:
        """Seconds and number of the steps of one run."""
        positions = np.arange(len(self.task.pool))
        draws = BatchStream(self.task.pool, [ShuffledStream(positions, 0)], self.task.recipe.batch_size)
        flops = (steps + 0.5) * self.step_flops
        fit = Trainer(self.task, Ledger()).fit(
            self.task.model(0), draws, flops, seed=0, phase=TRAIN, stage="final model"
        )
        return fit.seconds, len(fit.losses)

    def _timed(self, call: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _dimension(self, gradients: PerExample) -> int:
        return min(PROJECTED, sum(gradients.sizes.values()) // 2)


def _passes(task: Task) -> Any:
    """The precision of gradients of examples: that of the recipe, where they have it."""
    return "bf16" if task.recipe.precision == "bf16" else "no"


def measure(folder: Path, device: torch.device, *, size: str, tiny: bool, minutes: float) -> list[GpuMeasurement]:
    """All parts of both cases, until the time is up."""
    started, findings = time.monotonic(), []
    judged = device.type != "cpu" and not tiny
    cases = [
        lambda: language_case(_made(folder / "language"), size=size, tiny=tiny),
        lambda: vision_case(_made(folder / "vision"), tiny=tiny),
    ]
    for make in cases:
        bench = Bench(make(), device, judged=judged)
        is_language = bench.task.pretrained
        out = folder / bench.case.config.stem / "run"
        parts: dict[str, Callable[[], list[GpuMeasurement]]] = {
            "whole run": lambda out=out, bench=bench: bench.whole_run(out),  # type: ignore[misc]
            "speed": bench.speed,
            "online": bench.online,
            "memory": bench.memory,
        }
        if is_language:
            parts["features"] = bench.features
        if judged:
            parts["compiled"] = bench.compiled
        for name, part in parts.items():
            if time.monotonic() - started > 60 * minutes:
                findings.append(bench.finding(name, f"left out: {minutes:g} minutes are over"))
                continue
            measured = part()
            print(*(finding.line() for finding in measured), sep="\n", flush=True)
            findings += measured
    return findings


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; returns 0 where there is no GPU, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file")
    parser.add_argument("--size", choices=("135m", "1b"), default="135m", help="weights of the Llama")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no further part is begun")
    options = parser.parse_args(argv)
    kind = device_type()
    if kind == "cpu" and not options.tiny:
        print("There is no GPU here: nothing was measured. --tiny runs the same code with tiny models on the CPU.")
        return 0
    prepare_device(kind)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        findings = measure(
            Path(folder), torch.device(kind), size=options.size, tiny=options.tiny, minutes=options.minutes
        )
    words = shlex.join(["python", "-m", "experiments.gpu", *(sys.argv[1:] if argv is None else argv)])
    recipe = "Tiny models: these numbers say nothing of a GPU" if options.tiny else "Random weights and data"
    settings = device_settings(TrainConfig(precision="bf16"))
    text = "\n\n".join(
        [
            "# Training on a GPU" if kind != "cpu" else "# Training on a CPU, with tiny models",
            f"    {words}",
            f"{settings}. PyTorch {torch.__version__}. {recipe}. It took {duration(time.monotonic() - started)}.",
            "| task | what | value | bar | |\n| --- | --- | --- | --- | --- |\n"
            + "\n".join(f.line() for f in findings),
        ]
    )
    print(text)
    if options.out is not None:
        whole_file(options.out, text + "\n")
    failed = [f for f in findings if f.what == "`cads train`" and not f.met]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
