"""Rivals that weigh the sources by trials: Optuna, and the fit of a log-linear law of mixtures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import least_squares

from baselines.mixture_regression import CANDIDATES, MixtureRegression
from baselines.search.source_search import RungSearch, fidelity
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.subsample import subsample
from cads.data.token_batches import in_id_order
from cads.errors import NonFiniteError
from cads.monitor import Monitor
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, MixtureSpace, SearchSpace
from cads.seeding import derive
from cads.selection import Selection
from cads.task import Task
from cads.training.result import TrainResult
from experiments.rivals.packages import import_package

TRIAL_SHARE = 1 / 8
"""Share of the training budget C, and of each source, of a whole trial."""
REPORTS = (1 / 4, 1 / 2, 1.0)
"""Parts of a trial after which it is measured, and may be pruned."""
KL_WEIGHT = 0.05
"""Weight of the divergence from the natural mixture, nats a nat."""
RIDGE = 1e-2
"""Weight of the squared slopes of the law, in units of the spread of the objectives."""
EVALUATIONS = 200
"""Most evaluations of the law's residuals."""


@dataclass
class MixtureRival(RungSearch):
    """The final training draws part of each batch from the target, and takes classes in even turns unless it weighs."""

    target_fraction: float | None = 0.3
    """Share of each batch of the final training drawn from the target."""

    ranges_over: ClassVar[type[SearchSpace]] = MixtureSpace
    package: ClassVar[tuple[str, str] | None] = None
    """The module that it needs, and the distribution of that."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """See `cads.selector.Selector`.

        Raises:
            ConfigError: if the package is not installed.
        """
        if self.package is not None:
            import_package(*self.package)
        selection = super().select(task, budget, seed=seed, ledger=ledger, monitor=monitor)
        return replace(selection, balanced=not selection.weighted)


@dataclass
class Optuna(MixtureRival):
    """Optuna's TPE over the weights of sources, with its successive-halving pruner, until the allowance is spent.

    A trial trains for C/8, and is measured on the target after a quarter, a half and all of it. Pruned trials leave
    their FLOPs to others. The first trial is the natural mixture.
    """

    method: ClassVar[str] = "optuna"
    package: ClassVar[tuple[str, str] | None] = ("optuna", "optuna")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """As many trials as the allowance buys if none is pruned."""
        share = fidelity(costs, train_flops, TRIAL_SHARE)
        count = int(allowance / self._trial_flops(costs, share * train_flops))
        has_steps = REPORTS[0] * share * train_flops >= costs.step_flops
        return [Rung(share, share * train_flops, share, count)] if count >= 2 and has_steps else []

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train trial after trial; the best that was trained to its end."""
        optuna = import_package("optuna", "optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (rung,) = self.rungs(inner, space, train_flops)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=derive(seed, "sampler") % 2**32),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )
        study.enqueue_trial({f"weight {i}": 1.0 for i in range(len(space.sizes))})
        while inner.ledger.left >= self._trial_flops(inner, rung.flops):
            study.optimize(lambda trial: self._objective(optuna, trial, inner, space, rung, seed), n_trials=1)
        complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        best = _ratios(space, study.best_params) if complete else space.full
        return best, MixturePolicy(best, SIGMA)

    @staticmethod
    def _trial_flops(costs: InnerLoopCosts, flops: float) -> float:
        return flops + len(REPORTS) * costs.measuring_flops

    @staticmethod
    def _objective(optuna: Any, trial: Any, inner: InnerLoop, space: SearchSpace, rung: Rung, seed: int) -> float:
        names = [f"weight {i}" for i in range(len(space.sizes))]
        draw = _ratios(space, {name: trial.suggest_float(name, 0.0, 1.0) for name in names})
        pool, order = inner.task.pool, derive(seed, "trials")
        positions = in_id_order(pool, subsample(pool, rung.data_fraction, derive(order, "subsample")))
        stream, result, value = space.stream(draw, positions, order), None, np.inf
        inner.n_trials += 1
        for report, part in enumerate(REPORTS):
            result = _go_on(inner, stream, rung, part, result, order)
            if result is None:
                raise optuna.TrialPruned
            value = inner.evaluate(result.models[0], f"{rung.stage}, measuring").value
            trial.report(value, 2**report)
            if part < 1 and trial.should_prune():
                raise optuna.TrialPruned
        return float(value)


def _go_on(
    inner: InnerLoop, stream: Any, rung: Rung, part: float, before: TrainResult | None, seed: int
) -> TrainResult | None:
    """Train up to `part` of the trial; None if the loss is not finite."""
    spent = 0.0 if before is None else float(before.flops[-1])
    if part * rung.flops - spent < inner.step_flops:
        return before
    try:
        return inner.fit_on(
            part * rung.flops - spent,
            horizon=rung.flops,
            before=before,
            seed=seed,
            stage=rung.stage,
            stream=stream,
            target_fraction=0.0,
        )
    except NonFiniteError:
        return None


def _ratios(space: SearchSpace, weights: dict[str, float]) -> np.ndarray:
    """The ratio of each source, by the weight of one of its examples, shape (S,); all weights 0 count as equal."""
    values = np.array([weights[f"weight {i}"] for i in range(len(space.sizes))]) + 1e-9
    return np.asarray(values * space.sizes / (values * space.sizes).sum())


@dataclass
class LogLinear(MixtureRival, MixtureRegression):
    """Trials on random mixtures r, the law L(r) = c + exp(k + t.r) fitted to them, and the mixture where it is least.

    The law is that of Ye et al., ICLR 2025, arXiv 2403.16952. A divergence from the natural mixture is added, as in
    Olmix (Chen et al., 2026, arXiv 2602.12237).
    """

    method: ClassVar[str] = "log-linear"

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of the fit and of its predictions for all candidates."""
        columns = len(space.sizes) + 2
        return float(EVALUATIONS * 2 * (runs + columns) * columns**2 + 6 * CANDIDATES * columns)

    def best_predicted(self, mixtures: np.ndarray, objective: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """The candidate (S,) with the least predicted objective and divergence; see `MixtureRegression`."""
        finite = np.isfinite(objective)
        law = fit_law(mixtures[finite], objective[finite])
        natural = candidates.mean(axis=0)
        divergence = (candidates * np.log(np.maximum(candidates, 1e-12) / natural)).sum(axis=1)
        return np.asarray(candidates[np.argmin(law_values(law, candidates) + KL_WEIGHT * divergence)])


def law_values(law: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
    """c + exp(k + t.r) for each mixture (K, S), shape (K,); `law` holds c, k and t, shape (S + 2,)."""
    return np.asarray(law[0] + np.exp(np.clip(law[1] + mixtures @ law[2:], -50, 50)))


def fit_law(mixtures: np.ndarray, objective: np.ndarray) -> np.ndarray:
    """The law of `law_values` by least squares, its slopes shrunk by `RIDGE`, shape (S + 2,).

    Args:
        mixtures: shape (K, S). objective: shape (K,).
    """
    least, spread = float(objective.min()), float(objective.std()) + 1e-12

    def residuals(law: np.ndarray) -> np.ndarray:
        errors = (law_values(law, mixtures) - objective) / spread
        return np.concatenate([errors, np.sqrt(RIDGE) * law[2:]])

    start = np.concatenate([[least - spread, np.log(2 * spread)], np.zeros(mixtures.shape[1])])
    return np.asarray(least_squares(residuals, start, max_nfev=EVALUATIONS).x)
