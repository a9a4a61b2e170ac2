"""bergson: influence of pool examples on the loss of the target, by gradients and with the curvature of EKFAC.

Both take the gradients of all linear layers, at a model of the target, with bergson's collectors. `BergsonGradients`
projects them, and compares directions, as LESS and TrackStar do. `BergsonEkfac` computes g^T H^-1 g_i (Grosse et al.,
2023, arXiv 2308.03296), H by EKFAC of a sample of the pool. bergson's own commands read texts for language models, so
the passes are ours; the gradients, factors and their inverse are bergson's.
"""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.data.token_batches import by_id, scoring_batches
from cads.errors import NotAffordableError
from cads.scoring.reference_models import device_of
from cads.scoring.stages import Priced, RankingStage, TrainOnTarget
from cads.seeding import derive
from cads.task import Task
from experiments.rivals.packages import import_package, quiet
from experiments.rivals.subset import THETA, SubsetRival, affordable_passes, theta_seed

SIDE = 16
"""Each matrix is projected to 16 x 16."""
QUERIES = 256
"""Most target examples whose gradients are added up."""
SAMPLE = 256
"""Most pool examples of which the curvature is taken."""
TARGET_GRADIENTS, POOL_GRADIENTS, CURVATURE = "target gradients", "pool gradients", "curvature"


@dataclass
class Influence(SubsetRival):
    """Keeps the examples with the greatest influence."""

    fraction: float = 0.5
    """Share of the pool that is kept."""
    passes: float = 4.0
    """Most passes of the model over the target: those of LESS. The gradients of a target that is learned by heart
    vanish."""

    def stages(self, task: Task, flops: float) -> Sequence[RankingStage]:
        """See `SubsetRival`."""
        return self._theta(task, flops), *self._priced(task)

    def choose(self, task: Task, flops: float, seed: int, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """See `SubsetRival`."""
        theta = self._theta(task, flops).run(task, seed=theta_seed(seed), ledger=ledger).eval()
        for stage in self._priced(task):
            stage.charge(task, ledger)
        with ledger.timed(SELECT, POOL_GRADIENTS), quiet():
            queries = _sample(task.target, QUERIES, derive(seed, "queries"))
            score = self.influence(task, theta, queries, seed)
        kept = np.zeros(len(score), dtype=bool)
        order = by_id(task.pool)
        kept[order[np.argsort(-score[order], kind="stable")[: max(1, round(self.fraction * len(score)))]]] = True
        return kept, score

    def load(self) -> None:
        """See `SubsetRival`."""
        import_package("bergson", "bergson")

    @abstractmethod
    def influence(self, task: Task, theta: nn.Module, queries: np.ndarray, seed: int) -> np.ndarray:
        """Of each pool example on the target examples at `queries`, higher is better, float64, shape (N,)."""

    @abstractmethod
    def extra_flops(self, layers: Sequence[nn.Linear]) -> float:
        """FLOPs of an example beside its passes."""

    def n_curvature(self, task: Task) -> int:
        """Pool examples of which the curvature is taken."""
        return 0

    def _theta(self, task: Task, flops: float) -> TrainOnTarget:
        rest = flops - sum(stage.flops for stage in self._priced(task))
        if rest <= 0:
            raise NotAffordableError("the share of the budget does not buy the gradients of the pool")
        return TrainOnTarget(THETA, affordable_passes(task, task.target, self.passes, rest))

    def _priced(self, task: Task) -> list[Priced]:
        """One forward and backward pass over pool and queries, and two over the sample of the curvature."""
        extra = self.extra_flops(list(_layers(task.costs.model).values()))
        in_pool, in_target = (float(task.costs.usages(pool).mean()) for pool in (task.pool, task.target))
        priced = [
            Priced(TARGET_GRADIENTS, min(QUERIES, len(task.target)) * (in_target + extra)),
            Priced(POOL_GRADIENTS, len(task.pool) * (in_pool + extra)),
        ]
        count = self.n_curvature(task)
        return [*priced, Priced(CURVATURE, 2 * count * in_pool)] if count else priced


@dataclass
class BergsonGradients(Influence):
    """By the cosine of projected gradients to the mean gradient of the target."""

    method: ClassVar[str] = "bergson-gradients"

    def influence(self, task: Task, theta: nn.Module, queries: np.ndarray, seed: int) -> np.ndarray:
        """See `Influence`."""
        processor = import_package("bergson", "bergson").GradientProcessor(projection_dim=SIDE)
        target = sum(rows.sum(dim=0) for _, rows in _gradients(task, task.target, queries, theta, processor))
        score = np.empty(len(task.pool))
        for positions, rows in _gradients(task, task.pool, by_id(task.pool), theta, processor):
            score[positions] = (rows @ target / rows.norm(dim=1).clamp(min=1e-12)).double().cpu().numpy()
        return score

    def extra_flops(self, layers: Sequence[nn.Linear]) -> float:
        """Both sides of each gradient are projected, and the product is compared with that of the target."""
        return float(sum(2 * SIDE * (m.in_features + m.out_features) + 4 * SIDE**2 for m in layers))


@dataclass
class BergsonEkfac(Influence):
    """By g^T H^-1 g_i, H by EKFAC. The factors and their eigenvectors are in the seconds alone."""

    method: ClassVar[str] = "bergson-ekfac"

    def influence(self, task: Task, theta: nn.Module, queries: np.ndarray, seed: int) -> np.ndarray:
        """See `Influence`."""
        processor = import_package("bergson", "bergson").GradientProcessor()
        target = sum(rows.sum(dim=0) for _, rows in _gradients(task, task.target, queries, theta, processor))
        assert isinstance(target, Tensor)
        sample = _sample(task.pool, self.n_curvature(task), derive(seed, "curvature"))
        sizes = {name: m.in_features * m.out_features for name, m in _layers(theta).items()}
        parts = dict(zip(sizes, target[None].split(list(sizes.values()), dim=1), strict=True))
        direction = torch.cat(list(_curvature(task, theta, sample).apply(parts).values()), dim=1)[0]
        score = np.empty(len(task.pool))
        for positions, rows in _gradients(task, task.pool, by_id(task.pool), theta, processor):
            score[positions] = (rows @ direction).double().cpu().numpy()
        return score

    def extra_flops(self, layers: Sequence[nn.Linear]) -> float:
        """Each gradient is formed, and multiplied with that of the target."""
        return float(sum(4 * m.in_features * m.out_features for m in layers))

    def n_curvature(self, task: Task) -> int:
        """See `Influence`."""
        return min(SAMPLE, len(task.pool))


def _sample(pool: Pool, count: int, seed: int) -> np.ndarray:
    """At most `count` positions, in no order of the pool."""
    return np.random.default_rng(seed).permutation(by_id(pool))[:count]


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose gradients are compared, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _gradients(
    task: Task, pool: Pool, positions: np.ndarray, model: nn.Module, processor: Any
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """The gradients of examples in the weights of all linear layers, batch by batch: positions (B,), rows (B, D)."""
    base = import_package("bergson.collector.collector", "bergson").HookCollectorBase

    class Gradients(_flat(base)):  # type: ignore[misc]
        """Keeps the gradients that the hooks compute."""

        def setup(self) -> None:
            """Nothing."""

        def teardown(self) -> None:
            """Nothing."""

        def backward_hook(self, module: nn.Module, g: Tensor) -> None:
            """Keep the gradients of a layer."""
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **options: Any) -> None:
            """Nothing."""

    collector = Gradients(model, target_modules=set(_layers(model)), processor=processor)
    for rows in _passes(task, pool, positions, model, collector):
        yield rows, torch.cat([collector.mod_grads[name] for name in _layers(model)], dim=1)
        collector.mod_grads.clear()


def _curvature(task: Task, model: nn.Module, positions: np.ndarray) -> Any:
    """What multiplies gradients with H^-1, by EKFAC of the pool examples at `positions`, with bergson's damping."""
    eigenvectors = import_package("bergson.hessians.eigenvectors", "bergson")
    kfac = import_package("bergson.hessians.kfac", "bergson")
    preconditioner = import_package("bergson.hessians.preconditioner", "bergson")
    layers = set(_layers(model))
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": model, "path": folder, "target_modules": layers, "dtype": torch.float32}
        factors = _flat(kfac.CovarianceCollector)(**options)
        for _ in _passes(task, task.pool, positions, model, factors):
            pass
        bases = [
            eigenvectors.eigendecompose_owned(covariances, shapes, None, len(positions), folder, torch.float32)[0]
            for covariances, shapes in ((factors.A_cov_dict, factors.A_shapes), (factors.S_cov_dict, factors.S_shapes))
        ]
        corrections = _flat(eigenvectors.LambdaCollector)(**options, eigenvectors=tuple(bases))
        for _ in _passes(task, task.pool, positions, model, corrections):
            pass
        eigenvalues = {name: x / len(positions) for name, x in corrections.eigenvalue_corrections.items()}
    return preconditioner.FactoredPreconditioner(*bases, eigenvalues, sharded=False)


def _passes(task: Task, pool: Pool, positions: np.ndarray, model: nn.Module, collector: Any) -> Iterator[np.ndarray]:
    """Positions of each batch, after its forward and backward pass with the hooks of `collector`."""
    for rows in scoring_batches(pool, positions=positions):
        with collector.with_batch(torch.ones(len(rows), 1, dtype=torch.bool)):
            task.losses(model, pool.batch(rows).to(device_of(model))).sum().backward()
        model.zero_grad(set_to_none=True)
        yield rows


def _flat(base: Any) -> Any:
    """A collector for layers whose inputs have no sequence, shape (N, I): they get one of length 1."""

    class Flat(base):
        """Adds the dimension that bergson expects."""

        def _process_input(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            super()._process_input(module, (inputs[0].unsqueeze(1),), output)

        def _process_grad(self, module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            super()._process_grad(module, inputs, (outputs[0].unsqueeze(1),))

    return Flat
