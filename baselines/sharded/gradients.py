"""LESS file by file: a random sample of all files for the warm-up, the target's gradients once, then each file's.

The warm-up trains on the examples whose hash of the id is below `warmup_share`: each file finds its own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor

from baselines.gradients.features import POOL, PROJECTIONS, GradientFeatureConfig, GradientFeatures, unpacked
from baselines.gradients.projection import Dimension, make_projection
from baselines.gradients.warmup import PARTS, STAGE, Checkpoint, schedule, warm_up
from baselines.random import random_scores
from baselines.similarity.queries import subtask_weights
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.errors import DataError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.scoring.pool_scores import planned_flops
from cads.scoring.reference_models import in_pool_order, proxy_of
from cads.scoring.sharded import PoolPart, SampleTask, ShardedScoring, Values
from cads.seeding import derive
from cads.task import Task
from cads.tasks.language.tables import read_file

CENTRES = "centres"


class GradientSettings(Protocol):
    """What is asked of `baselines.less.Less`."""

    method: ClassVar[str]
    warmup_share: float
    checkpoints: int
    dimension: Dimension

    @property
    def cut(self) -> Cut:
        """How its ranking is cut."""
        ...

    def feature_config(self) -> GradientFeatureConfig:
        """The options that determine the features."""
        ...

    def sizes(self, task: Task) -> dict[str, int]:
        """Number of entries of each parameter whose gradients are taken."""
        ...


class ShardedGradients(ShardedScoring):
    """Similarities of gradients, as those of `Less.rank` after the warm-up."""

    surveys = True

    def __init__(self, less: GradientSettings, config: dict[str, Any]) -> None:
        super().__init__(less.method, config, less.cut)
        self._less = less

    def survey(self, part: PoolPart, prepared: State, *, seed: int, ledger: Ledger) -> pa.Table:
        """The rows of the file that the warm-up trains on, as JSON."""
        pool = part.task.pool
        if pool.origin is None:
            raise DataError(f"{part.path}: the rows of its examples are not known, from which the warm-up draws")
        drawn = random_scores(pool, derive(seed, STAGE)) < self._less.warmup_share
        rows = read_file(part.path).take(pa.array(np.sort(pool.origin.row[drawn])))
        return pa.table({"row": pa.array([json.dumps(row, default=str) for row in rows.to_pylist()], pa.string())})

    def combine(
        self,
        surveys: Iterable[pa.Table],
        task: Task,
        prepared: State,
        *,
        sample: SampleTask,
        seed: int,
        ledger: Ledger,
        monitor: Monitor | None = None,
    ) -> State:
        """Warm up on the sample, and take the gradients of the target at each checkpoint.

        Raises:
            DataError: if the sample is empty.
        """
        texts = itertools.chain.from_iterable(table["row"].to_pylist() for table in surveys)
        rows = [json.loads(text) for text in texts]
        if not rows:
            raise DataError(f"no example was drawn for the warm-up: raise warmup_share = {self._less.warmup_share}")
        scorer = proxy_of(sample(rows))
        self._less.sizes(scorer)
        plan = schedule(scorer, 1.0, self._less.checkpoints)
        checkpoints = warm_up(scorer, plan, seed=seed, ledger=ledger, monitor=monitor)
        features = self._features(proxy_of(task), seed, ledger)
        features.check(checkpoints[0])
        queries, state = subtask_weights(proxy_of(task)), State({"checkpoints": [], "batched": features.batched})
        for i, checkpoint in enumerate(checkpoints):
            features.load(checkpoint)
            state.tensors |= _stored(checkpoint, i)
            state.tensors[f"{i}/{CENTRES}"] = features.centres(queries).cpu()
            state.values["checkpoints"].append({"steps": checkpoint.steps, "rate": checkpoint.rate})
        return state

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """See `ShardedScoring`."""
        checkpoints = [_restored(state, i) for i in range(len(state.values["checkpoints"]))]
        weights, model = self._weights(state), proxy_of(task).model(seed)

        def values(part: Task, ledger: Ledger) -> np.ndarray:
            scorer = proxy_of(part)
            features = GradientFeatures(self._less.feature_config(), scorer, model, seed, ledger)
            features.batched = features.batched and bool(state.values["batched"])
            scores = np.zeros((len(scorer.pool), len(checkpoints[0][1])))
            for i, ((checkpoint, centres), weight) in enumerate(zip(checkpoints, weights, strict=True)):
                features.load(checkpoint)
                scores += weight * features.similarities_to(centres, f"{i + 1} of {len(checkpoints)}")
            return in_pool_order(scores.max(axis=1), scorer.pool, part.pool)

        return values

    def plan(self, task: Task) -> PlannedLedger:
        """Gradients and projections of the pool at every checkpoint."""
        ledger, scorer, less = PlannedLedger(), proxy_of(task), self._less
        config, pool = less.feature_config(), unpacked(scorer.pool)
        flops = planned_flops(config.price(scorer), pool, tokens=config.batch_tokens)
        ledger.charge(SELECT, POOL, less.checkpoints * flops)
        projection = make_projection(less.sizes(scorer), less.dimension, 0)
        ledger.charge(SELECT, PROJECTIONS, less.checkpoints * projection.flops(len(pool)))
        return ledger

    def notes(self, state: State) -> dict[str, Any]:
        """As those of `Less.rank`."""
        return {"checkpoint_weights": self._weights(state).tolist()}

    def _features(self, scorer: Task, seed: int, ledger: Ledger) -> GradientFeatures:
        return GradientFeatures(self._less.feature_config(), scorer, scorer.model(seed), seed, ledger)

    def _weights(self, state: State) -> np.ndarray:
        rates = np.array([checkpoint["rate"] for checkpoint in state.values["checkpoints"]])
        return np.asarray(rates / rates.sum())


def _stored(checkpoint: Checkpoint, i: int) -> dict[str, Tensor]:
    return {f"{i}/{part}/{name}": x for part in PARTS for name, x in getattr(checkpoint, part).items()}


def _restored(state: State, i: int) -> tuple[Checkpoint, Tensor]:
    """Checkpoint i, and the centres of the target at it."""
    parts: dict[str, dict[str, Tensor]] = {}
    for part in PARTS:
        prefix = f"{i}/{part}/"
        parts[part] = {n.removeprefix(prefix): x for n, x in state.tensors.items() if n.startswith(prefix)}
    values = state.values["checkpoints"][i]
    return Checkpoint(**parts, steps=values["steps"], rate=values["rate"]), state.tensors[f"{i}/{CENTRES}"]
