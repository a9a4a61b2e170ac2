"""Perplexity: the loss of an example under a scorer that may be fine-tuned on the target.

Source: CCDS (arXiv 2410.16208), whose PPL ranks by the perplexity of prompt and answer. CCDS reads longer texts in
strided windows and averages their losses. Here even `recipe = paper` reads a text as the task does: truncated to the
task's maximum length (`max_tokens`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from baselines.random import random_scores
from baselines.similarity.pool_losses import Order, check_batch_tokens, check_order, in_order, pool_losses, whole_texts
from cads.accounting.ledger import Ledger
from cads.data.ids import rank_by_score
from cads.data.pool import Pool
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.scoring.stages import ReadPool, TrainOnTarget
from cads.seeding import derive
from cads.task import Task

Recipe = Literal["cads", "paper"]
PAPER_PASSES = 4.0
"""Passes over the target with which CCDS fine-tunes the scorer."""
THIRDS: dict[Order, tuple[int, int, int]] = {"low": (0, 1, 2), "mid": (1, 0, 2), "high": (2, 1, 0)}
"""The thirds of the pool by increasing perplexity, in the order in which CCDS trains on them."""
TUNING, SCORING = "fine-tuning", "scores"


@dataclass
class Perplexity(Ranker):
    """The loss of each example (nats; for texts the mean over its answer tokens) under one model.

    Perplexity is the exponential of the loss and gives the same ranking. The scorer is the task's proxy if it has one.
    """

    order: Order = "mid"
    """Which examples come first: those of low loss, of a loss close to the median, or of high loss."""
    fine_tune: float | None = None
    """Passes over the target that fine-tune the scorer first; null: none, or 4 with recipe = paper."""
    recipe: Recipe = "cads"
    """cads: loss of the answer tokens, in order of loss. paper: loss of all tokens, in shuffled thirds, as in CCDS."""
    autocast: bool = False
    """Score in bfloat16 whatever the precision of training: faster on hardware that supports it; losses are off by
    about 1 %."""
    batch_tokens: int | None = None
    """Padded tokens of a batch when the pool is scored; null: as many as suit the device (512 on a CPU, where with
    autocast twice as many are faster)."""

    method: ClassVar[str] = "ppl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)
        if self.recipe not in get_args(Recipe):
            raise ConfigError(f"recipe = {self.recipe!r}: choose from {list(get_args(Recipe))}")
        check_passes(fine_tune=self.passes)
        check_batch_tokens(self.batch_tokens)

    @property
    def passes(self) -> float:
        """Passes over the target with which the scorer is fine-tuned."""
        if self.fine_tune is not None:
            return self.fine_tune
        return PAPER_PASSES if self.recipe == "paper" else 0.0

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Fine-tune the scorer if `passes` is above 0, and score the pool; see `cads.scoring.ranker.Ranker`."""
        scorer = self.scorer_of(task)
        tuning, scoring = self.stages(scorer)
        pool = scoring.pool_of(scorer)
        model = tuning.run(scorer, seed=seed, ledger=ledger, monitor=monitor)
        losses = pool_losses(scorer, model, scoring, ledger=ledger, autocast=self.autocast)
        if self.recipe == "paper":
            score = shuffled_thirds(pool, losses, self.order, derive(seed, "thirds"))
        else:
            score = in_order(losses, self.order)
        return self.ranking(task, score, seed=seed, ledger=ledger, pool=pool, median_loss=float(np.median(losses)))

    def stages(self, scorer: Task) -> tuple[TrainOnTarget, ReadPool]:
        """See `cads.scoring.ranker.Ranker`."""
        pool = whole_texts(scorer.pool) if self.recipe == "paper" else None
        return TrainOnTarget(TUNING, self.passes), ReadPool(SCORING, self.batch_tokens, pool=pool)

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.losses import JudgedLoss, ShardedLosses

        if self.recipe == "paper":
            raise not_sharded(self.method, "the thirds of recipe = paper order the whole pool; use recipe = cads")
        loss = JudgedLoss(
            TrainOnTarget(TUNING, self.passes),
            ReadPool(SCORING, self.batch_tokens),
            seed,
            sign=-1.0 if self.order == "low" else 1.0,
        )
        middle = self.order == "mid"
        return ShardedLosses(self.method, asdict(self), self.cut, [loss], nearest_median=middle, autocast=self.autocast)


def shuffled_thirds(pool: Pool, losses: np.ndarray, order: Order, seed: int) -> np.ndarray:
    """Scores that rank the thirds of the pool by loss in `order`, and shuffle each third by seed; shape (N,)."""
    third = 3 * rank_by_score(pool.ids, -losses) // len(losses)
    turn = np.empty(3, dtype=np.int64)
    turn[list(THIRDS[order])] = np.arange(3)
    return random_scores(pool, seed) - turn[third]
