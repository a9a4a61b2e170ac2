"""Do scores mean what they should: wrong labels found, and losses of retrained models foretold.

    python -m experiments.conformance --out experiments/results/conformance.md

AUC: the probability that an example with a right label has a higher score than one with a wrong label. LDS, the linear
datamodeling score (Park et al., "TRAK", ICML 2023, arXiv 2303.14186): models are trained on random halves of the pool;
the sum of the scores of a half is compared, by Spearman's correlation, with the target loss of its models.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from scipy.stats import rankdata, spearmanr

from baselines.less import Less
from baselines.loss import Loss
from baselines.random import random_scores
from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, Ledger
from cads.data.streams import ShuffledStream
from cads.data.token_batches import in_id_order
from cads.data.training_batches import BatchStream
from cads.errors import CadsError, ConfigError
from cads.runtime.atomic_files import whole_file
from cads.scoring.ranker import Ranker
from cads.seeding import derive
from cads.selectors.online.selector import Cads
from cads.selectors.online.strata import Strata
from cads.study.grid import read_grid, settings
from cads.task import Task
from cads.tasks.vision.task import VisionTask
from cads.training.trainer import Trainer
from experiments.online import without_sources
from experiments.truth import REPLICAS

CONFIG = Path(__file__).parent / "configs" / "conformance.yaml"
ONLINE_PASSES, TRAINED_PASSES = 16.0, 4.0
"""Passes over the pool of a run of `cads`; of a model that is trained on half of the pool."""
SUBSETS, TRAININGS = 128, 4
"""Random halves of the pool; models, with other weights and orders, that are trained on each."""
ORACLE = "right labels (not known)"

Score = Callable[[Task, int], np.ndarray]
"""A score for each example of the pool, higher is better, shape (N,); the integer is the seed."""

Rows = dict[str, tuple[float, float, float]]
"""AUC, AUC within sources and LDS of each score, by its name."""
Measured = tuple[Rows, float]
"""The rows of one seed, and the correlation of the losses of one half of the trainings with those of the other."""


def ranked(ranker: Ranker) -> Score:
    """The scores of a ranking."""
    return lambda task, seed: ranker.rank(task, seed=seed, ledger=Ledger()).scores_of(task.pool)


def online(task: Task, seed: int) -> np.ndarray:
    """The probabilities at the end of a run of `cads`."""
    selection = Cads().select(task, Budget(ONLINE_PASSES, "epochs"), seed=seed, ledger=Ledger())
    return selection.probability[pc.index_in(task.pool.ids, value_set=selection.ids).to_numpy()]


def label_part(task: Task, seed: int) -> np.ndarray:
    """What of the probability of `cads` is not of the source and the class: 1 for the likeliest example of each."""
    probability, strata = online(task, seed), Strata.of(task)
    cells = strata.sources.astype(np.int64) * strata.n_groups + strata.groups
    most = np.zeros(strata.n_sources * strata.n_groups)
    np.maximum.at(most, cells, probability)
    return probability / most[cells]


SCORES: dict[str, Score] = {
    "`cads`, probability": online,
    "`cads`, over the highest of source and class": label_part,
    "`cads`, sources hidden": lambda task, seed: online(without_sources(task), seed),
    "`less`": ranked(Less()),
    "`less`, warm-up on the whole pool": ranked(Less(warmup_share=1.0)),
    "`loss`": ranked(Loss()),
    "random": lambda task, seed: random_scores(task.pool, derive(seed, "conformance")),
    ORACLE: lambda task, seed: right_labels(task).astype(float),
}
"""The scores that are measured, by their names in the table."""


def right_labels(task: Task) -> np.ndarray:
    """Which labels of the pool are right, bool, shape (N,).

    Raises:
        ConfigError: if the task does not know, or all or none are.
    """
    truth = task.truth if isinstance(task, VisionTask) else None
    if truth is None or truth.corrupted.all() or not truth.corrupted.any():
        raise ConfigError(
            f"{task.name} must have sources with and without wrong labels: set label_noise in task.sources"
        )
    return ~truth.corrupted


def auc(score: np.ndarray, right: np.ndarray, sources: np.ndarray | None = None) -> float:
    """The share of pairs of a right and a wrong label in which the right one has the higher score; ties count half.

    Args:
        score: shape (N,). right: bool, shape (N,).
        sources: codes, shape (N,): pairs are of the same source only. None: of the whole pool.

    Returns:
        from 0 to 1; NaN without a pair.
    """
    codes = np.zeros(len(score), dtype=int) if sources is None else sources
    won, pairs = 0.0, 0
    for code in np.unique(codes):
        ranks, good = rankdata(score[codes == code]), right[codes == code]
        n = int(good.sum())
        won += float(ranks[good].sum()) - n * (n + 1) / 2
        pairs += n * (len(good) - n)
    return won / pairs if pairs else float("nan")


def lds(score: np.ndarray, masks: np.ndarray, losses: np.ndarray) -> float:
    """Spearman's correlation over subsets of the sum of `score` (shape (N,)) with the fall of the loss.

    Args:
        masks: the subsets, bool, shape (M, N). losses: of models trained on them, shape (M,).
    """
    return float(spearmanr(masks @ score, -losses).statistic)


def halves(n: int, count: int, seed: int) -> np.ndarray:
    """Random subsets of n // 2 of n examples, bool, shape (count, n)."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n) < n // 2 for _ in range(count)])


def target_losses(task: Task, masks: np.ndarray, seed: int) -> np.ndarray:
    """Mean target loss, nats, of a model trained on each subset of the pool, each from its own weights, shape (M,).

    Args:
        masks: bool, shape (M, N).
    """
    flops, trainer, losses = Budget(TRAINED_PASSES, "epochs").flops(task), Trainer(task, Ledger()), []
    for start in range(0, len(masks), REPLICAS):
        chunk = range(start, min(start + REPLICAS, len(masks)))
        streams = [
            ShuffledStream(in_id_order(task.pool, np.flatnonzero(masks[i])), derive(seed, "order", i)) for i in chunk
        ]
        models = [task.model(derive(seed, "model", i)) for i in chunk]
        draws = BatchStream(task.pool, streams, task.recipe.batch_size)
        fit = trainer.fit_replicas(models, draws, flops, seed=derive(seed, start), phase=EVALUATE, stage="truth")
        losses += [task.metrics(model, task.target)["loss"] for model in fit.models]
    return np.array(losses)


def measure(task: Task, seed: int, subsets: int) -> Measured:
    """All scores with one seed, on `subsets` random halves of the pool."""
    right, masks = right_labels(task), halves(len(task.pool), subsets, derive(seed, "halves"))
    losses = np.stack([target_losses(task, masks, derive(seed, "training", i)) for i in range(TRAININGS)])
    agreement = spearmanr(losses[::2].mean(axis=0), losses[1::2].mean(axis=0)).statistic
    rows: Rows = {}
    for name, score_of in SCORES.items():
        score = score_of(task, seed)
        values = auc(score, right), auc(score, right, task.pool.sources), lds(score, masks, losses.mean(axis=0))
        rows[name] = values
        print(f"seed {seed}: {name}: " + ", ".join(f"{x:.3f}" for x in values), flush=True)
    return rows, float(agreement)


def table(rows: Sequence[Rows]) -> str:
    """Means over seeds, and the value of each seed in brackets."""
    lines = ["| score | AUC | AUC within sources | LDS |", "| --- | --- | --- | --- |"]
    for name in rows[0]:
        columns = np.array([row[name] for row in rows]).T
        texts = [f"{x.mean():.3f} ({', '.join(f'{v:.3f}' for v in x)})" for x in columns]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def page(command: str, tasks: Sequence[Task], subsets: int, results: Sequence[Measured], seconds: float) -> str:
    """The results of all seeds, as Markdown."""
    first = tasks[0]
    wrong = ", ".join(f"{1 - right_labels(task).mean():.0%}" for task in tasks)
    agreement = ", ".join(f"{value:.2f}" for _, value in results)
    return f"""# Wrong labels found, and losses foretold, by scores of examples

    {command}

{first.name}: {len(first.pool):,} examples in the sources {"; ".join(first.pool.source_names)}.
The target has {len(first.target):,}. Seeds {", ".join(map(str, range(len(tasks))))}, of data and training.
Wrong labels: {wrong}. Means over seeds, and each seed in brackets. {seconds:.0f} s of CPU in all.

- AUC: how often a right label has a higher score than a wrong one; chance is 0.5.
- AUC within sources: both labels are of the same source, so that it does not help to know which source is noisy.
- LDS: Spearman's correlation of the sum of scores with the fall of the mean target loss.
  It is over {subsets} random halves of the pool. Chance is 0 ± {1.96 / np.sqrt(subsets - 1):.2f} for one seed.
- On each half {TRAININGS} models are trained, and their losses averaged. Each trains on the pool alone, for the cost of
  {TRAINED_PASSES:g} passes over all of it.
- The means of two of the {TRAININGS} models agree with those of the others at {agreement}: losses are that noisy.
- `cads` runs for {ONLINE_PASSES:g} passes. Its probability also evens out classes, as training draws them.
- `less` and `loss` have their defaults, where no other is named. LDS is of one score for the whole target.

{table([rows for rows, _ in results])}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all scores with each seed of the configuration and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="grid whose task, recipe and seeds are used")
    parser.add_argument("--subsets", type=int, default=SUBSETS, help="random halves of the pool")
    parser.add_argument("--out", type=Path, help="Markdown file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        tasks = [setting.build() for setting in settings(read_grid(args.config))]
        results = [measure(task, seed, args.subsets) for seed, task in enumerate(tasks)]
    except CadsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "experiments.conformance", *(sys.argv[1:] if argv is None else argv)])
    text = page(command, tasks, args.subsets, results, time.process_time() - started)
    print(text)
    if args.out is not None:
        whole_file(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
