"""Low loss: train on the examples with the lowest loss under a model fitted to the target."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from baselines.similarity.pool_losses import Order, check_batch_tokens, check_order, in_order, pool_losses
from cads.accounting.ledger import Ledger
from cads.monitor import Monitor
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes
from cads.scoring.sharded import ShardedScoring
from cads.scoring.stages import ReadPool, TrainOnTarget
from cads.seeding import derive
from cads.task import Task

FITTING, SCORING = "theta", "R"


@dataclass
class Loss(Ranker):
    """Ranks by l_i(theta), the loss under the target model theta, which is trained on the target."""

    order: Order = "low"
    """Which examples come first: those of low loss, of a loss close to the median, or of high loss."""
    passes: float = 8.0
    """Passes of theta over the target; 0 scores with the initial (or pretrained) weights."""
    batch_tokens: int | None = None
    """Padded tokens of a batch when the pool is scored; null: as many as suit the device (512 on a CPU)."""

    method: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)
        check_passes(passes=self.passes)
        check_batch_tokens(self.batch_tokens)

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Train theta on the target, and score the pool with it; see `cads.scoring.ranker.Ranker`."""
        scorer = self.scorer_of(task)
        fitting, scoring = self.stages(scorer)
        model_seed = derive(seed, "theta") if fitting.passes else seed
        theta = fitting.run(scorer, seed=model_seed, ledger=ledger, monitor=monitor)
        losses = pool_losses(scorer, theta, scoring, ledger=ledger)
        return self.ranking(task, in_order(losses, self.order), seed=seed, ledger=ledger, pool=scorer.pool)

    def stages(self, scorer: Task) -> tuple[TrainOnTarget, ReadPool]:
        """See `cads.scoring.ranker.Ranker`."""
        return TrainOnTarget(FITTING, self.passes), ReadPool(SCORING, self.batch_tokens)

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.losses import JudgedLoss, ShardedLosses

        loss = JudgedLoss(
            TrainOnTarget(FITTING, self.passes),
            ReadPool(SCORING, self.batch_tokens),
            derive(seed, "theta") if self.passes else seed,
            sign=-1.0 if self.order == "low" else 1.0,
        )
        return ShardedLosses(self.method, asdict(self), self.cut, [loss], nearest_median=self.order == "mid")
