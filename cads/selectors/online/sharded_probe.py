"""The probe of `cads` file by file: which sources are like the target, by losses of a few examples of every file.

A model of the target judges, as it does in a run that does not train on the target (`theta`). Its losses on the probes
give each source its weight, as in a run. Nothing is trained on the pool here. So the weights are those of the
beginning of a run, and what is kept is a random sample in which a source counts by its weight: the examples with the
highest log(u) / v, for a hash u of the id in (0, 1) and the weight v of the source (Efraimidis and Spirakis, 2006).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from cads.accounting.ledger import Ledger, PlannedLedger
from cads.data.draws import draw_by_source
from cads.data.pool import Pool
from cads.errors import DataError
from cads.monitor import Monitor
from cads.policies.tilt import tilted
from cads.runtime.checkpoint import State
from cads.scoring.cut import Cut
from cads.scoring.pool_scores import score_pool
from cads.scoring.reference_models import device_of
from cads.scoring.sharded import PoolPart, ShardedScoring, Values, load_part, trained_part
from cads.scoring.stages import TrainOnTarget, on_training_device
from cads.seeding import derive, derive_each
from cads.selectors.online.opening import FIRST_PROBE, PROBE
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED, OnlineConstants
from cads.selectors.online.signal import SourceExcess
from cads.task import Task

EPOCHS = 4.0
"""Passes over what is kept: up to four are nearly as good as fresh data (arXiv 2305.16264)."""
FITTING = "theta"
N_GROUPS = 64
"""More groups than a task of texts has."""


class ShardedProbe(ShardedScoring):
    """Weights of sources by the probe, and a weighted sample of the pool."""

    surveys = True

    def __init__(self, method: str, config: dict[str, Any]) -> None:
        super().__init__(method, config, Cut(None, EPOCHS, "by size"))
        self._judges: list[nn.Module] | None = None

    def prepare(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> State:
        """Train a model of the target."""
        fitting = TrainOnTarget(FITTING, self._constants(task).first_passes)
        return State({}, trained_part(fitting.run(task, seed=derive(seed, FITTING), ledger=ledger, monitor=monitor)))

    def survey(self, part: PoolPart, prepared: State, *, seed: int, ledger: Ledger) -> pa.Table:
        """The signal of some examples of each source of the file: the loss of the model, or by how much it fell.

        Raises:
            DataError: if the pool has no sources.
        """
        task, constants = part.task, self._constants(part.task)
        pool = task.pool
        if pool.sources is None:
            raise DataError(
                "the probe of cads tells sources apart, and the pool has none: name several entries in task.pool, or a "
                "source column"
            )
        count = max(1, -(-constants.probes // part.n_files))
        rows = np.concatenate(draw_by_source(pool, count, derive(seed, PROBE)))
        probes = pool.subset(rows, pool.name)
        if self._judges is None:
            self._judges = self._models(task, prepared, seed)
        signal = _losses(task, probes, self._judges[0], PROBE, ledger)
        if constants.drop:
            signal = signal - _losses(task, probes, self._judges[1], FIRST_PROBE, ledger)
        groups = task.loss_groups(probes)
        return pa.table(
            {
                "source": pa.array([pool.source_names[i] for i in pool.sources[rows]], pa.string()),
                "group": np.zeros(len(rows), dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64),
                "signal": signal,
            }
        )

    def combine(self, surveys: Iterable[pa.Table], task: Task, prepared: State, **others: Any) -> State:
        """The weight of each source.

        Raises:
            DataError: if there is one source only.
        """
        table = pa.concat_tables(list(surveys)).combine_chunks()
        names = sorted(set(table["source"].to_pylist()))
        if len(names) < 2:
            raise DataError(f"the pool has one source, {names[0]!r}: the probe of cads tells sources apart")
        constants, codes = self._constants(task), {name: i for i, name in enumerate(names)}
        sources = np.array([codes[name] for name in table["source"].to_pylist()])
        groups = table["group"].to_numpy()
        # All probes count alike: memory reaches back over all of them.
        excess = SourceExcess(len(names), max(N_GROUPS, int(groups.max()) + 1), np.inf)
        excess.add(table["signal"].to_numpy(), sources, groups, np.ones(len(table)))
        weights = tilted(excess.mean, constants.sharpness, constants.floor, constants.most_excess)
        return State(
            {
                "sources": names,
                "weights": weights.tolist(),
                "signal": excess.mean.tolist(),
                "stderr": excess.stderr.tolist(),
                "probes": np.bincount(sources, minlength=len(names)).tolist(),
            }
        )

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """log(u) / v of each example."""
        weight_of = dict(zip(state.values["sources"], state.values["weights"], strict=True))

        def values(part: Task, ledger: Ledger) -> np.ndarray:
            pool = part.pool
            weights = np.array([weight_of[name] for name in pool.source_names])[pool.sources]
            uniform = (derive_each(derive(seed, "sample"), pool.ids) + 0.5) / 2.0**63
            return np.asarray(np.log(uniform) / weights)

        return values

    def plan(self, task: Task) -> PlannedLedger:
        """Nothing is spent on examples that are not probed."""
        return PlannedLedger()

    def notes(self, state: State) -> dict[str, Any]:
        """The probe."""
        return {"probe": dict(state.values)}

    def source_probability(self, state: State) -> dict[str, float]:
        """The weight of each source, the largest 1."""
        return dict(zip(state.values["sources"], state.values["weights"], strict=True))

    def _constants(self, task: Task) -> OnlineConstants:
        return PRETRAINED if task.pretrained else FROM_SCRATCH

    def _models(self, task: Task, prepared: State, seed: int) -> list[nn.Module]:
        """The model of the target, and the initial one."""
        fitted, initial = (task.model(derive(seed, FITTING)) for _ in range(2))
        load_part(fitted, prepared.tensors)
        return [on_training_device(task, model) for model in (fitted, initial)]


def _losses(task: Task, pool: Pool, model: nn.Module, stage: str, ledger: Ledger) -> np.ndarray:
    """The loss of each example of `pool`, nats, shape (n,)."""
    model.eval()
    return score_pool(
        pool,
        lambda batch: task.losses(model, batch),
        task.costs.forward,
        ledger=ledger,
        stage=stage,
        device=device_of(model),
        precision=task.recipe.precision,
    )
