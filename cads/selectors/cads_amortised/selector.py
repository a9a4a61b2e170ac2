"""CADS with an amortised policy: probabilities as a function of cheap features, for pools too large to read.

CADS-E (`cads.selectors.cads_e.selector`) gives each example a probability of its own, and has to read all of them. Here
the probability is a function of features, with as many parameters as there are features.

The policy is learned on a sample of the pool, with the estimators of CADS (arXiv 2510.16806). Candidates are one step
along the penalty's gradient from the uniform policy. Trials of the true objective, on rungs of growing fidelity,
compare them. The corrected policy gradient moves the parameters. Then the policy is applied to as much of the rest as
the budget pays for, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from cads.accounting.ledger import Ledger
from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.errors import ConfigError, NotAffordableError
from cads.policies.simplex import Floats
from cads.scoring.features import KINDS, FreeFeatures, Kind, ReadFeatures
from cads.scoring.pool_scores import score_pool
from cads.search.base import NO_SEARCH_AFFORDABLE, Search, check_reference, guard_message
from cads.search.choice import Choice
from cads.search.fidelity import Rung
from cads.search.guard import beats_full_pool
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.stages import FitTarget, ScorePool, Stages, Trials, UpdatePolicy, reference_trial
from cads.seeding import derive
from cads.selectors.cads_amortised.allowance import (
    CONTROL_DRAWS,
    AmortisedBudget,
    affordable,
    divide_allowance,
    exploring,
    padding,
)
from cads.selectors.cads_amortised.policy import AmortisedPolicy, corrected_slope, mirrored
from cads.selectors.cads_amortised.sample import Penalty, Proposal, Sample, candidates, learn_from, visit_order
from cads.selectors.cads_e.candidates import entropy, most_probable
from cads.task import ObjectiveValue, Task

SIGMA = 0.75
"""Standard deviation of the parameters in exploration, in logits per standardised feature."""
STEP = 1.0
"""Length of the step along the corrected gradient, in units of the distance of draws from the centre."""
SHARD = 2**16
"""Examples whose probabilities are computed at once if their features are free."""


@dataclass
class CadsAmortised(Search):
    """Probabilities as a function of loss, entropy, margin, source and length, learned on a sample of the pool.

    The target model is fitted to one half of the target, the reference model to the sample. If the budget does not pay
    for a forward pass over the pool, features that are free select from all of it. If there are none, a random share of
    the pool is read.
    """

    features: list[Kind] | None = None
    """What the policy looks at, of loss, confidence (entropy and margin), source and length; null: all there is."""
    share: float | None = None
    """Share of the pool that is read and selected from; null: what the budget pays for. Where all features are free,
    they select from the whole pool."""

    method: ClassVar[str] = "cads-amortised"
    held_out: ClassVar[bool] = True
    whole_sources: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 < self.share <= 1:
            raise ConfigError(f"share = {self.share}: a share of the pool, above 0 and at most 1")
        if self.features is not None and not (self.features and set(self.features) <= set(KINDS)):
            raise ConfigError(f"features = {self.features}: choose some of {list(KINDS)}")

    @property
    def kinds(self) -> Sequence[Kind]:
        """The kinds of features that the policy may use."""
        return KINDS if self.features is None else self.features

    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """Both models, the sample, the trials, and the pass, which is left out if the full pool wins; see `Search`."""
        parts = divide_allowance(costs, train_flops, self.kinds, self.share)
        yield FitTarget(parts.theta)
        yield ScorePool(parts.sample, "R")
        if parts.u:
            yield reference_trial(parts.u, train_flops)
            yield ScorePool(parts.sample, "l*")
        yield UpdatePolicy(parts.learning_flops)
        rungs = affordable(costs, parts, train_flops)
        if not rungs:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        available = len(parts.steps)
        for rung_index, rung in enumerate(rungs):
            tried = exploring(rungs, rung_index)
            available = min(rung.n_trials - 1 - tried - (tried > 0), available)
            _, count = parts.visible(len(costs.task.pool), rung.data_fraction)
            yield UpdatePolicy(parts.comparing_flops(available + tried + (tried > 0), count))
            yield Trials(replace(rung, n_trials=1 + available))
            if tried:
                available += tried + 1
                yield Trials(replace(rung, n_trials=tried))
                yield UpdatePolicy(parts.exploring_flops(tried))
                yield Trials(replace(rung, n_trials=1))
        if parts.forward and parts.read > parts.sample:
            yield ScorePool(parts.read - parts.sample, "pass")
        yield UpdatePolicy(parts.applying_flops)

    def run_search(self, inner: InnerLoop, train_flops: float, seed: int) -> Choice:
        """Learn the policy on the sample, compare candidates rung by rung, and apply the best one; see `Search`."""
        task = inner.task
        parts = divide_allowance(inner, train_flops, self.kinds, self.share)
        order = visit_order(task.pool, derive(seed, "visit"))
        sample = learn_from(inner, parts, self.kinds, order, seed)
        proposals = candidates(sample, parts.steps)
        inner.learn(parts.learning_flops)
        rungs = affordable(inner, parts, train_flops)
        best, improvement = run_rungs(inner, parts, sample, proposals, rungs, seed, guard=self.guard)
        if best is None and not (rungs and proposals):
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        if best is None:
            return Choice.full_pool(task.pool, guard_message(guard=self.guard, chosen=False))
        probability, read = apply_policy(inner, parts, best.policy, sample)
        inner.learn(parts.applying_flops)
        selected, probability = fill_unread(parts, probability, order, read)
        inner.monitor.panels(task.pool, probability, len(rungs), task.describe)
        return Choice(
            selected=selected,
            score=probability,
            probability=probability,
            notes={
                "guard": guard_message(guard=self.guard, chosen=True),
                "gain": improvement,
                "c2/c1": best.reach_weight,
                "kept": best.kept,
                "origin": best.origin,
                "sample": parts.sample,
                "read": read if parts.forward else parts.sample,
                "way": parts.describe_scope(len(task.pool)),
                "policy": best.policy.to_json(),
            },
        )


def run_rungs(
    inner: InnerLoop,
    parts: AmortisedBudget,
    sample: Sample,
    proposals: list[Proposal],
    rungs: Sequence[Rung],
    seed: int,
    *,
    guard: bool,
) -> tuple[Proposal | None, float]:
    """Compare proposals and the full pool rung by rung, and explore around the best of them.

    Returns:
        the best proposal, or None if it does not beat the full pool; and its improvement of the outer objective.
    """
    candidates, delta_objective, best, n_compared = proposals, np.zeros(len(proposals)), None, 0
    for rung_index, rung in enumerate(rungs if proposals else []):
        tried = exploring(rungs, rung_index)
        candidates = candidates[: rung.n_trials - 1 - tried - (tried > 0)]
        runs = compare(inner, parts, sample, [None, *(p.policy for p in candidates)], rung, seed, rung_index)
        check_reference(float(runs.objective[0]), rung.stage)
        delta_objective, stderr = runs.objective[1:] - runs.objective[0], runs.stderr[1:]
        n_compared = n_compared or len(candidates)
        if tried and np.isfinite(delta_objective).any():
            explored, values, errors = explore(
                inner, parts, sample, candidates, delta_objective, runs, tried, rung, seed
            )
            candidates, delta_objective = [*candidates, *explored], np.append(delta_objective, values)
            stderr = np.append(stderr, errors)
            n_compared += len(explored)
        order = np.argsort(np.nan_to_num(delta_objective, nan=np.inf), kind="stable")
        candidates, delta_objective, stderr = [candidates[i] for i in order], delta_objective[order], stderr[order]
        passes = (
            beats_full_pool(delta_objective[0], stderr[0], n_compared) if guard else np.isfinite(delta_objective[0])
        )
        best = candidates[0] if passes else None
        watch(inner, sample, best, runs.objective, delta_objective, rung_index)
    return best, 0.0 if best is None else -float(delta_objective[0])


def compare(
    inner: InnerLoop,
    parts: AmortisedBudget,
    sample: Sample,
    policies: Sequence[AmortisedPolicy | None],
    rung: Rung,
    seed: int,
    rung_index: int,
    reference: ObjectiveValue | None = None,
) -> InnerRuns:
    """A trial of each policy (None: the full pool); `reference` as in `InnerLoop.run`.

    A trial is a scaled-down final training. From the rung's share of the pool, a policy gets the part that would be
    read, and the part that would be added at random. So it sees its examples as often as the final training.
    """
    n = len(inner.task.pool)
    n_examples, count = parts.visible(n, rung.data_fraction)
    inner.learn(parts.comparing_flops(sum(policy is not None for policy in policies), count))
    min_examples = round(parts.least * n_examples / n)
    order_seed = derive(seed, "rung", rung_index)
    visited_positions = sample.order[:n_examples]
    kept_by_policy: list[list[np.ndarray]] = [[] for _ in policies]
    for start in range(0, count, SHARD):
        shard = slice(start, min(start + SHARD, count))
        features = sample.rows(shard)
        for policy, kept_parts in zip(policies, kept_by_policy, strict=True):
            if policy is not None:
                kept_parts.append(visited_positions[shard][policy.probabilities(features) > 0.5])
    streams = []
    for policy, kept_parts in zip(policies, kept_by_policy, strict=True):
        positions = visited_positions
        if policy is not None:
            positions = np.concatenate(
                [*kept_parts, visited_positions[count:][: max(0, min_examples - sum(map(len, kept_parts)))]]
            )
        streams.append(ShuffledStream(positions if len(positions) else visited_positions, order_seed))
    return inner.run(streams, rung.flops, seed=order_seed, stage=rung.stage, reference=reference, keep=0)


def explore(
    inner: InnerLoop,
    parts: AmortisedBudget,
    sample: Sample,
    candidates: Sequence[Proposal],
    delta_objective: np.ndarray,
    reference_runs: InnerRuns,
    tried: int,
    rung: Rung,
    seed: int,
) -> tuple[list[Proposal], Floats, Floats]:
    """Draw policies around the best candidate, step along the corrected gradient in v = (w, b), and try all of them.

    The control variate is the penalty, c1 R - c2 l*, with c1 and c2 from the candidates, which are other draws.

    Args:
        reference_runs: the trials of the rung so far, that of the full pool first.

    Returns:
        the policies that were drawn, and the one to which the step leads; their `delta_objective`, and its standard
        errors.
    """
    full_pool, reference = float(reference_runs.objective[0]), reference_runs.reference
    origin = candidates[int(np.nanargmin(delta_objective))]
    centre = origin.policy.parameters
    sigma = SIGMA * np.append(~sample.grouped, True).astype(np.float64)
    draws = mirrored(centre, sigma, tried // 2, np.random.default_rng(derive(seed, "explore")))
    policies = [origin.policy.at(v) for v in draws]
    runs = compare(inner, parts, sample, policies, rung, seed, 0, reference)
    values, errors = runs.objective - full_pool, runs.stderr
    inner.learn(parts.exploring_flops(tried))
    proposals = [Proposal(p, origin.reach_weight, origin.kept, "draw") for p in policies]
    # A mirrored pair is used as a whole or not at all: half of it would not cancel constants.
    is_finite = np.isfinite(values).reshape(-1, 2).all(axis=1).repeat(2)
    if not is_finite.any():
        return proposals, values, errors
    penalty = Penalty.fitted(sample, [p.policy for p in candidates], delta_objective)
    control_values = [penalty.value(policies[k]) for k in np.flatnonzero(is_finite)]
    control_draws = mirrored(centre, sigma, CONTROL_DRAWS, np.random.default_rng(derive(seed, "control")))
    slope = np.mean([penalty.slope(origin.policy.at(v)) for v in control_draws], axis=0)
    gradient = corrected_slope(centre, sigma, draws[is_finite], values[is_finite], np.array(control_values), slope)
    if length := float(np.linalg.norm(gradient)):
        moved = centre - STEP * float(np.linalg.norm(sigma)) * gradient / length
        proposals.append(Proposal(origin.policy.at(moved), origin.reach_weight, origin.kept, "corrected gradient"))
        runs = compare(inner, parts, sample, [proposals[-1].policy], rung, seed, 0, reference)
        values, errors = np.append(values, runs.objective - full_pool), np.append(errors, runs.stderr)
    return proposals, values, errors


def apply_policy(
    inner: InnerLoop, parts: AmortisedBudget, policy: AmortisedPolicy, sample: Sample
) -> tuple[Floats, int]:
    """The probability of every example, 0 where the policy was not applied; and the number to which it was applied."""
    pool, order = inner.task.pool, sample.order
    probability = np.zeros(len(pool))
    rest = order[: parts.read]
    if sample.read is not None:
        probability[order[: parts.sample]] = policy.probabilities(sample.features)
        rest = rest[parts.sample :]
        if (cost_factor := padding(inner)) > 1:
            available = inner.ledger.left - parts.applying_flops
            rest = rest[: max(0, int(available / (cost_factor * inner.scoring_flops(1))))]
    if len(rest):
        probability[rest] = probabilities_of(policy, inner.task, pool, rest, read=sample.read, ledger=inner.ledger)
    return probability, len(rest) + (0 if sample.read is None else parts.sample)


def probabilities_of(
    policy: AmortisedPolicy,
    task: Task,
    pool: Pool,
    positions: np.ndarray,
    *,
    read: ReadFeatures | None,
    ledger: Ledger,
) -> Floats:
    """The probabilities of the examples at `positions` of a pool, or of a shard that was never seen, shape (n,).

    Of the examples that are read only the probabilities are kept. The forward pass is charged to "select"/"pass".

    Args:
        read: computes the first features of the policy, with the model of its learning; None if all are free.

    Raises:
        ConfigError: if the policy uses features that this pool or `read` does not have.
    """
    free = FreeFeatures(task, pool)
    if not len(positions):
        return np.empty(0)
    if read is None:
        shards = [positions[start : start + SHARD] for start in range(0, len(positions), SHARD)]
        return np.concatenate([policy.probabilities(free.values(policy.names, shard)) for shard in shards])
    names = policy.names[len(read.names) :]
    if policy.names[: len(read.names)] != tuple(read.names):
        raise ConfigError(f"the policy looks at {policy.names}, and {read.names} are read: read what it was learned on")

    def score(batch: Batch) -> torch.Tensor:
        read_features, free_features = read(batch).cpu().numpy(), free.values(names, batch.positions.cpu().numpy())
        return torch.from_numpy(policy.probabilities(np.hstack([read_features, free_features])))

    price, device = task.costs.forward, read.device
    return score_pool(pool, score, price, ledger=ledger, stage="pass", device=device, positions=positions)


def fill_unread(parts: AmortisedBudget, probability: Floats, order: np.ndarray, read: int) -> tuple[np.ndarray, Floats]:
    """What is selected, bool, and the probability of each example, shape (N,) each, with unread ones added at random.

    Unread examples are added only if the final training would see those of the policy too often
    (`AmortisedBudget.least`). If the policy chooses nothing and none is added, everything is selected.
    """
    selected = probability > 0.5
    missing = max(0, round(parts.least) - int(selected.sum()))
    unread = order[read:]
    added = unread[:missing]
    selected[added] = True
    if len(unread):
        probability = probability.copy()
        probability[unread] = len(added) / len(unread)
    return most_probable(selected), probability


def watch(
    inner: InnerLoop,
    sample: Sample,
    best: Proposal | None,
    objective: np.ndarray,
    delta_objective: np.ndarray,
    rung_index: int,
) -> None:
    """Record the state of the search after a rung."""
    monitor = inner.monitor
    monitor.scalar("outer/objective", float(np.nanmin(objective)), rung_index)
    monitor.scalar("outer/best_gain", float(np.nanmin(np.append(delta_objective, 0.0))), rung_index)
    if best is None:
        return
    probability = best.policy.probabilities(sample.features)
    monitor.scalar("outer/target_model_loss", float(np.average(sample.from_theta, weights=probability)), rung_index)
    monitor.scalar("outer/entropy", entropy(probability), rung_index)
    monitor.scalar("control/ratio_of_weights", best.reach_weight, rung_index)
    monitor.histogram("outer/probabilities", probability, rung_index)
