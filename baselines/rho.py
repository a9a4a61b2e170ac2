"""RHO: reducible holdout loss, the part of an example's loss that can still be learned.

Source: Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt",
ICML 2022, arXiv 2206.07137, equation 3, scored once rather than in every batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from baselines.similarity.pool_losses import check_batch_tokens, pool_losses
from cads.accounting.ledger import Ledger
from cads.errors import ConfigError
from cads.monitor import Monitor
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.reference_models import check_passes
from cads.scoring.sharded import ShardedScoring, not_sharded
from cads.scoring.stages import ReadPool, TrainOnPool, TrainOnTarget
from cads.seeding import derive
from cads.task import Task

HOLDOUT, HOLDOUT_LOSSES = "holdout model", "holdout losses"
POOL, POOL_LOSSES = "pool model", "pool losses"


@dataclass
class Rho(Ranker):
    """Ranks by l_i(u) - l_i(theta): the loss under the reference model u less that under the target model theta.

    u is trained on the pool, theta on the target, which serves as the holdout set.
    """

    pool_passes: float = 1.0
    """Passes of the reference model u over the pool; 0 for its initial (or pretrained) weights."""
    target_passes: float = 8.0
    """Passes of the target model theta over the target."""
    batch_tokens: int | None = None
    """Padded tokens of a batch when the pool is scored; null: as many as suit the device (512 on a CPU)."""

    method: ClassVar[str] = "rho"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_passes(pool_passes=self.pool_passes, target_passes=self.target_passes)
        if not self.target_passes:
            raise ConfigError("target_passes = 0: without a holdout model there is no reducible loss; train it")
        check_batch_tokens(self.batch_tokens)

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Train both models from the same initial weights, and score the pool with each.

        See `cads.scoring.ranker.Ranker`.
        """
        scorer, model_seed = self.scorer_of(task), derive(seed, "rho")
        fit_theta, read_with_theta, fit_u, read_with_u = self.stages(scorer)
        theta = fit_theta.run(scorer, seed=model_seed, ledger=ledger, monitor=monitor)
        irreducible = pool_losses(scorer, theta, read_with_theta, ledger=ledger)
        u = fit_u.run(scorer, seeds=[model_seed], ledger=ledger, monitor=monitor)[0]
        losses = pool_losses(scorer, u, read_with_u, ledger=ledger)
        return self.ranking(task, losses - irreducible, seed=seed, ledger=ledger, pool=scorer.pool)

    def stages(self, scorer: Task) -> tuple[TrainOnTarget, ReadPool, TrainOnPool, ReadPool]:
        """See `cads.scoring.ranker.Ranker`."""
        return (
            TrainOnTarget(HOLDOUT, self.target_passes),
            ReadPool(HOLDOUT_LOSSES, self.batch_tokens),
            TrainOnPool(POOL, self.pool_passes),
            ReadPool(POOL_LOSSES, self.batch_tokens),
        )

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        from baselines.sharded.losses import JudgedLoss, ShardedLosses

        if self.pool_passes:
            raise not_sharded(self.method, f"pool_passes = {self.pool_passes} trains on the whole pool; give 0")
        model_seed = derive(seed, "rho")
        irreducible = JudgedLoss(
            TrainOnTarget(HOLDOUT, self.target_passes),
            ReadPool(HOLDOUT_LOSSES, self.batch_tokens),
            model_seed,
            sign=-1.0,
        )
        losses = JudgedLoss(None, ReadPool(POOL_LOSSES, self.batch_tokens), model_seed)
        return ShardedLosses(self.method, asdict(self), self.cut, [irreducible, losses])
