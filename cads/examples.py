"""CADS-E: which examples to train on. One probability for each, moved by what two models disagree about.

The penalty form of CADS (arXiv 2510.16806) gives example i the signal `c1 l_i(theta) - c2 l_i(u)`: theta is
fitted to the target, u to draws from the policy, so `R - l*` needs no sampling (Rao-Blackwell). How much l*
counts, and how far to move, follow from the budget: both are chosen by short runs of the true objective.
A theta that has seen the target often enough, and then the target with what the policy keeps, needs no u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
from scipy.special import expit

from cads.budget import Budget, Ledger
from cads.draws import Epochs
from cads.inner import Inner, Planned, Purse
from cads.monitor import Monitor
from cads.one_run import OneRunSearch, by_example, watch_sources
from cads.operations import candidates_flops
from cads.optimizer import Rung, subsample
from cads.search import NOTHING, check_reference, verdict
from cads.seeds import derive
from cads.selection import Selection

THETA_SHARE, THETA_PASSES = 0.2, 20
"""theta is fitted to the target for this share of C, but for no more passes over it than this."""
REFERENCE_SHARE = 0.25
"""u is trained on the pool for this share of C."""
EACH_OF_ALLOWANCE = 0.15
"""Share of the allowance that theta, and u, take at most."""
STEPS = (
    (0.6, -1.0), (0.85, 1.0), (0.5, 1.0), (0.85, -1.0), (0.6, 0.0), (0.5, -1.0), (0.85, 0.0), (0.95, -1.0),
)  # fmt: skip
"""Steps that are tried, the widest spread first: the expected share of the pool that is kept, which is the length of
the step, and the weight c2/c1 of l*, which must come from the data. Positive, it cancels what u has learned by
heart, as in the penalty; at few passes u has learned nothing by heart and l* carries no such signal, but u is one
more opinion on what belongs to the task: there the weight is negative."""
FIDELITIES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of C: of the runs that compare candidates where the allowance is small; of those that do so otherwise; and
of those in which the best candidate must then beat the full pool. Shorter runs take easy examples for the better ones,
since they help early and not later."""
TAUGHT, LEAST_TAUGHT = 1.5, 0.3
"""Shares of C: what theta takes at most, in two halves, where short runs of the highest fidelity decide besides, and
at least. Only a theta that has seen the target often enough tells what is wrong from what is hard."""
WORTH_REPEATING = 0.75
"""Share of C that theta takes at least for its second half to be worth another pass over the pool."""
KEPT_FOR_THETA, TARGET_FRACTION = 0.6, 0.3
"""In its second half theta is trained, as in the penalty, on the target and on what the policy keeps: this share of the
pool. The target is this share of each batch."""
LENGTHS = (0.6, 0.8, 0.9, 0.7, 0.5)
"""Shares of the pool that such a theta's candidates keep, those that are tried where few can be tried first."""
LEAST_STEPS, LEAST_RUNS = 40, 3
"""Steps of the shortest run, and runs, the full pool's among them, that are worth comparing."""
SHARPNESS = 3.0
"""Slope of the probabilities in the standardised signal."""


@dataclass(frozen=True)
class Signals:
    """What the candidates are made of.

    Attributes:
        from_theta: losses, nats, shape (N,). from_u: the same, or None without u.
        steps: share of the pool that is kept and weight of l* of each candidate.
        groups: index of the examples of each group within which they compete; one for all of them if there are none.
    """

    from_theta: np.ndarray
    from_u: np.ndarray | None
    steps: Sequence[tuple[float, float]]
    groups: Sequence[np.ndarray | slice] = (slice(None),)

    @classmethod
    def of(
        cls,
        from_theta: np.ndarray,
        from_u: np.ndarray | None,
        steps: Sequence[tuple[float, float]],
        groups: np.ndarray | None = None,
    ) -> Signals:
        """With the group of each example, shape (N,), or None."""
        if groups is None:
            return cls(from_theta, from_u, steps)
        order = np.argsort(groups, kind="stable")
        return cls(from_theta, from_u, steps, np.split(order, np.flatnonzero(np.diff(groups[order])) + 1))

    @property
    def everything(self) -> Candidate:
        """The full pool."""
        return Candidate(self, 0.0, 1.0)

    @property
    def candidates(self) -> list[Candidate]:
        """Policies one gradient step away from the uniform one."""
        return [Candidate(self, weight, kept) for kept, weight in self.steps]


@dataclass(frozen=True)
class Candidate:
    """A policy over examples, known by how it is made: that of a large pool is computed when it is asked for.

    Attributes:
        signals: what it is made of. reach_weight: c2/c1, of l*.
        kept: share of the pool with s_i > 1/2, the length of the step; 1 for all of it.
    """

    signals: Signals
    reach_weight: float
    kept: float

    @property
    def flops(self) -> float:
        """Of computing it."""
        return 0.0 if self.kept == 1 else candidates_flops(len(self.signals.from_theta), 1)

    def probability(self) -> np.ndarray:
        """s of each example, shape (N,).

        The Rao-Blackwellised gradient in s_i is proportional to `l_i(theta) - (c2/c1) l_i(u)` minus its mean. A
        step in the logits leaves `s_i = sigmoid(k (q - z_i))`, z the standardised signal; its length is given by
        the share of the pool with s_i > 1/2, so q is that quantile of z, in each group.
        """
        from_theta, from_u = self.signals.from_theta, self.signals.from_u
        if self.kept == 1:
            return np.ones(len(from_theta))
        signal = from_theta if from_u is None else from_theta - self.reach_weight * from_u
        z = signal - signal.mean()
        z /= max(float(signal.std()), 1e-12)
        for group in self.signals.groups:
            z[group] -= np.quantile(z[group], self.kept)
        z *= -SHARPNESS
        return np.asarray(expit(z))


@dataclass
class CadsExamples(OneRunSearch):
    """CADS-E: selection probabilities for single examples; sources are not needed.

    theta is fitted to one half of the target and u to the pool; each candidate policy is one step along the
    penalty's gradient from the uniform policy, of its own length and weight on l*, the same in each class. A ladder
    of short runs finds the best one on the other half of the target, the full pool among them throughout. Where the
    allowance buys more, theta is trained for longer, in the end on the target and on what it keeps itself, u is not
    needed, and a few long runs decide.
    """

    method: ClassVar[str] = "cads-e"
    held_out: ClassVar[bool] = True
    whole_sources: ClassVar[bool] = False
    default_allowance: ClassVar[float] = 3.0
    weigh = staticmethod(by_example)

    def spend(self, purse: Planned, training: float) -> bool:
        """What `search` would do; see `Search`."""
        n = len(purse.task.pool)
        teachers = teachers_of(purse, training)
        if not teachers.theta:
            return False
        purse.fit_target(teachers.theta, stage="theta")
        purse.losses(n, stage="R")
        if teachers.again:
            purse.learn(candidates_flops(n, 1))
            purse.fit_target(teachers.again, stage="theta, with the pool")
            purse.losses(n, stage="R")
        if teachers.u:
            purse.run(1, teachers.u, stage="u")
            purse.losses(n, stage="l*")
        steps = teachers.steps
        rungs = teachers.comparisons(purse, training)
        for rung in rungs:
            runs = min(rung.runs, 1 + len(steps))
            # All but the full pool's, and the best one once more.
            purse.learn(candidates_flops(n, runs))
            purse.run(runs, rung.flops, stage=rung.stage)
        return bool(rungs)

    def search(self, inner: Inner, budget: Budget, training: float, seed: int, ledger: Ledger) -> Selection:
        """theta, u, the candidates, and the ladder; see `Search`."""
        task, monitor = inner.task, inner.monitor
        teachers = teachers_of(inner, training)
        signals = learn_from(inner, teachers, seed)
        rungs = teachers.comparisons(inner, training)
        if not rungs:
            return self.full_pool(task, budget, seed, ledger, NOTHING)
        everything = signals.everything
        field = [everything, *signals.candidates]
        for height, rung in enumerate(rungs):
            field = field[: rung.runs]
            gains = compare(inner, field, rung, seed, height)
            order = [0, *(1 + np.argsort(np.nan_to_num(gains[1:], nan=np.inf), kind="stable"))]
            field, gains = [field[i] for i in order], gains[order]
            chosen = len(field) > 1 and (gains[1] < 0 or (np.isfinite(gains[1]) and not self.guard))
            best, gain = (field[1], -float(gains[1])) if chosen else (everything, 0.0)
            inner.learn(best.flops)
            probability = best.probability()
            watch_penalty(monitor, signals, probability, height)
            watch_sources(monitor, task.pool, probability, height)
            monitor.scalar("outer/best_gain", float(np.nanmin(gains)), height)
            monitor.scalar("outer/entropy", entropy(probability), height)
            monitor.scalar("control/c2_over_c1", best.reach_weight, height)
            monitor.histogram("outer/probabilities", probability, height)
        monitor.panels(task.pool, probability, len(rungs), task.describe)
        return Selection.of(
            task.pool,
            selected=most_probable(probability),
            score=probability,
            probability=probability,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            notes={
                "guard": verdict(best is not everything),
                "gain": gain,
                "c2/c1": best.reach_weight,
                "kept": best.kept,
            },
        )


@dataclass(frozen=True)
class Teachers:
    """What the models cost whose losses are the signals, FLOPs; 0 for what the ledger does not buy.

    Attributes:
        theta: fitted to the target. again: theta once more, on the target and on what the policy keeps.
        u: trained on the pool. thorough: whether theta may take what only few and long short runs leave.
    """

    theta: float = 0.0
    again: float = 0.0
    u: float = 0.0
    thorough: bool = False

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Share that is kept and weight of l* of the candidates that these models make."""
        return [(kept, 0.0) for kept in LENGTHS] if self.thorough else affordable_steps(with_reach=self.u > 0)

    def comparisons(self, purse: Purse, training: float) -> list[Rung]:
        """The short runs that are left to compare candidates, once these models are paid for."""
        per_run = candidates_flops(len(purse.task.pool), 1)
        if not self.thorough:
            return comparisons(purse, training, per_run=per_run)
        f, price = deciding(purse, training)
        if (runs := int(purse.ledger.left / price)) < 2:
            return []
        return [purse.deciding_rung(f, training, runs)]


def deciding(purse: Purse, training: float) -> tuple[float, float]:
    """Share of C, and price, of a short run that decides by itself."""
    f = shortest(purse, training, FIDELITIES[2])
    return f, f * training + purse.measuring_flops + candidates_flops(len(purse.task.pool), 1)


def teachers_of(purse: Purse, training: float) -> Teachers:
    """The models that what is left of the ledger buys, with a pass over the pool each, beside the short runs."""
    n = len(purse.task.pool)
    scoring, left = purse.scoring_flops(n), purse.ledger.left
    fidelity, price = deciding(purse, training)
    spare = min(TAUGHT * training, left - LEAST_RUNS * price - scoring)
    if fidelity <= 1 and spare >= max(LEAST_TAUGHT * training, purse.target_step_flops):
        both = min(spare, left - LEAST_RUNS * price - 2 * scoring - candidates_flops(n, 1))
        from_target = round(TARGET_FRACTION * purse.task.recipe.batch_size)
        if from_target and both >= max(WORTH_REPEATING * training, 2 * purse.target_step_flops):
            return Teachers(both / 2, both / 2, thorough=True)
        return Teachers(spare, thorough=True)
    each = EACH_OF_ALLOWANCE * left / training
    theta = purse.target_flops(min(THETA_SHARE, each), THETA_PASSES, training)
    per_run = purse.measuring_flops + candidates_flops(n, 1)
    least = shortest(purse, training, FIDELITIES[0])
    most = left - LEAST_RUNS * (least * training + per_run)
    if least > 1 or theta < purse.target_step_flops or theta + scoring > most:
        return Teachers()
    u = min(REFERENCE_SHARE, each) * training
    if u < purse.step_flops or theta + u + 2 * scoring + purse.measuring_flops > most:
        return Teachers(theta)
    return Teachers(theta, u=u)


def comparisons(
    purse: Purse,
    training: float,
    *,
    lowest: float = FIDELITIES[0],
    least_runs: int = LEAST_RUNS,
    per_run: float = 0.0,
    reserve: float = 0.0,
) -> list[Rung]:
    """The short runs that what is left of the ledger buys: of candidates, and of the best one against the full pool.

    Args:
        lowest: share of C of the runs where the allowance is small.
        least_runs: of the full pool and of candidates; where fewer can be paid, there are none.
        per_run: FLOPs on top of training and measuring, for the policy. reserve: FLOPs that are not to be spent.
    """
    left = purse.ledger.left - reserve
    small, usual, confirmed = (shortest(purse, training, f) for f in (lowest, *FIDELITIES[1:]))
    price = {f: f * training + purse.measuring_flops + per_run for f in (small, usual, confirmed)}
    if (first := int((left - 2 * price[confirmed]) / price[usual])) >= LEAST_RUNS and usual < confirmed:
        runs = {usual: first, confirmed: 2}
    else:
        f = usual if left >= LEAST_RUNS * price[usual] else small
        runs = {f: int(left / price[f])}
    lowest_share, compared = next(iter(runs.items()))
    if lowest_share > 1 or compared < least_runs:
        return []
    return [purse.deciding_rung(f, training, n) for f, n in runs.items()]


def shortest(purse: Purse, training: float, fidelity: float) -> float:
    """`fidelity`, or more where that would be too few steps."""
    return max(fidelity, LEAST_STEPS * purse.step_flops / training)


def learn_from(inner: Inner, teachers: Teachers, seed: int) -> Signals:
    """The losses of every example under theta and, if there is one, under u."""
    task, everything = inner.task, np.arange(len(inner.task.pool))
    groups, steps = task.groups(task.pool), teachers.steps
    theta = inner.fit_target(teachers.theta, seed=derive(seed, "theta"), stage="theta")
    signals = Signals.of(inner.losses(theta, everything, stage="R"), None, steps, groups)
    if teachers.again:
        inner.learn(candidates_flops(len(everything), 1))
        kept = everything[most_probable(Candidate(signals, 0.0, KEPT_FOR_THETA).probability())]
        order = derive(seed, "theta", "with the pool")
        theta = inner.fit_target(
            teachers.again,
            seed=order,
            stage="theta, with the pool",
            model=theta,
            stream=Epochs(kept, order),
            target_fraction=TARGET_FRACTION,
        )
        return Signals.of(inner.losses(theta, everything, stage="R"), None, steps, groups)
    if not teachers.u:
        return signals
    order = derive(seed, "reference")
    runs = inner.run([Epochs(everything, order)], teachers.u, seed=order, stage="u")
    check_reference(float(runs.objective[0]), "u")
    return replace(signals, from_u=inner.losses(runs.models[0], everything, stage="l*"))


def affordable_steps(*, with_reach: bool) -> list[tuple[float, float]]:
    """Those of `STEPS` that can be taken: without l*, the ones that give it no weight."""
    return [(kept, weight) for kept, weight in STEPS if with_reach or not weight]


def compare(inner: Inner, field: Sequence[Candidate], rung: Rung, seed: int, height: int) -> np.ndarray:
    """The objective of each candidate less that of the first (the full pool), after a short run; shape (K,)."""
    positions = subsample(inner.task.pool, rung.data, derive(seed, "subsample"))
    order = derive(seed, "rung", height)
    streams = []
    for candidate in field:
        inner.learn(candidate.flops)
        chosen = positions[most_probable(candidate.probability()[positions])]
        streams.append(Epochs(chosen, order))
    runs = inner.run(streams, rung.flops, seed=order, stage=rung.stage)
    check_reference(float(runs.objective[0]), rung.stage)
    inner.monitor.scalar("outer/objective", float(np.nanmin(runs.objective)), height)
    return np.asarray(runs.objective - runs.objective[0])


def most_probable(probability: np.ndarray) -> np.ndarray:
    """The most probable mask, bool, shape (N,); where that is empty, everything: groups of one example have s = 1/2."""
    selected = probability > 0.5
    return selected if selected.any() else np.ones(len(selected), dtype=bool)


def entropy(probability: np.ndarray) -> float:
    """Mean entropy of one example's selection, nats."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())


def watch_penalty(monitor: Monitor, signals: Signals, probability: np.ndarray, step: int) -> None:
    """Record R, l* and the gap in expectation over a policy (shape (N,))."""
    risk = float(np.average(signals.from_theta, weights=probability))
    monitor.scalar("outer/R", risk, step)
    if signals.from_u is not None:
        reach = float(np.average(signals.from_u, weights=probability))
        monitor.scalar("outer/l*", reach, step)
        monitor.scalar("outer/gap", risk - reach, step)
