"""The rider of a run: it draws each batch by the present probabilities, and moves them by the losses of the batch."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from scipy.special import logit
from torch import Tensor

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.streams import Stream
from cads.data.target_share import share_by_size
from cads.data.token_batches import lengths
from cads.data.training_batches import WINDOW, by_length
from cads.data.window_loader import Rows, WindowLoader
from cads.policies.label_odds import LabelOdds
from cads.policies.tilt import tilted
from cads.policies.visits import visits
from cads.selectors.online.history import HistoryPoint, PolicyHistory
from cads.selectors.online.schedule import OnlineConstants
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import Strata
from cads.training.rider import Rider

MEMORY = 128 / 0.02
"""Rows over which running means of losses and weights reach back: a decay of 0.98 for 128 rows."""
KNOWS = 0.4
"""Mean probability of the target's labels from which a model can judge the labels of others. Below it, weights by
likelihood cost 0.2 to 1.3 points in small models at one pass."""
DRAWN_TOGETHER = 256
"""Rows that are drawn together, with the probabilities of that moment, and rows by whose losses these then move, in one
step of the outer loop. On a GPU the host waits there, and at no other step."""
LATER_ODDS = 1.0
"""Nats by which the log odds of a label may rise once probabilities no longer move: a model that fits it better after
that has learned it by heart. Without this bound, 64 passes over 1,100 digits ended 2.4 points lower."""
TARGET_MEMORY = 64
"""Rows of the target over which that mean reaches back."""
ALIKE = 0.5
"""Sources of at least this weight, the largest being 1, are like the target."""
NUMBERS = ("rows", "windows", "target_rows", "target_owed", "known")
"""Counters that are part of the state."""
OBSERVED = ("observed rows", "observed losses", "observed target losses")
"""What a window has shown so far: rows of the pool and their losses, and losses of the target; part of the state."""


class OnlineRider(Rider):
    """Draws target and pool by the present probabilities, and moves these by the losses, some steps at a time.

    Args:
        pool, target: whose examples are drawn.
        strata: sources, likeness and groups of the pool.
        target_stream: positions of the target. target_start: how many of them an earlier phase has taken.
        excess: the signal so far.
        odds: of the labels, or None if all examples of a source count alike.
        by_source: whether sources get weights of their own.
        on_target: whether the target is trained on; if not, a model of it has told sources apart, for good.
        batch_size: examples in a step.
        workers: threads that load the batches of a window ahead; 0 loads each when it is needed. Bits do not depend
            on it. None: no batch is loaded, and the rows of `draw` are all that is asked for.
        constants: of the run.
        history: of the probabilities; it is added to.
        seed: of the order of draws.
        n_rows: rows of pool and target that the budget pays for.
        fixed_share: share of the target in each batch; None: it follows from the sizes of both.

    Attributes:
        weights: the latest weight of each pool example, float16, shape (N,); NaN before the first.
    """

    def __init__(
        self,
        pool: Pool,
        target: Pool,
        strata: Strata,
        *,
        target_stream: Stream,
        target_start: int,
        excess: SourceExcess,
        odds: LabelOdds | None,
        by_source: bool,
        on_target: bool,
        batch_size: int,
        workers: int | None,
        constants: OnlineConstants,
        history: PolicyHistory,
        seed: int,
        n_rows: float,
        fixed_share: float | None = None,
    ) -> None:
        super().__init__(pool, batch_size)
        self.excess, self.odds, self.history = excess, odds, history
        self.weights = np.full(len(pool), np.nan, dtype=np.float16)
        self._targets, self._strata, self._target_stream = target, strata, target_stream
        self._by_source, self._on_target = by_source, on_target
        self._constants, self._seed, self._fixed_share = constants, seed, fixed_share
        self._cells = strata.cells(pool, seed)
        self._masses = self._cells.mass.reshape(strata.shape)
        self._learning_rows = constants.learning_passes * len(pool)
        self._lengths = _lengths(pool, target)
        self._window = steps_drawn_together(pool, target, batch_size)
        self._n_rows = n_rows
        self._source_weights = self._new_source_weights()
        self._numbers = dict.fromkeys(NUMBERS, 0.0) | {"target_rows": float(target_start)}
        self._pending: list[Rows] = []
        self._loader = None if workers is None else WindowLoader(pool, target, workers=workers)
        self._drawn: Rows = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        self._unobserved: list[Rows] = []
        self._observed: list[tuple[np.ndarray, ...]] = []

    @property
    def source_weights(self) -> np.ndarray:
        """v of each source, the largest 1, shape (S,)."""
        return self._source_weights

    def _new_source_weights(self) -> np.ndarray:
        """How often an example of each source is drawn: by its signal, its right labels, and how long the run is."""
        if not self._by_source:
            return np.ones(self._strata.n_sources)
        constants = self._constants
        v = tilted(self.excess.mean, constants.sharpness, 0.0, constants.most_excess)
        if self.odds is not None:
            v = v * (1 - self.odds.wrong)
        if constants.half_worth is not None:
            # The target is one more source, and as good as the best.
            n_target = len(self._targets) if self._on_target else 0
            sizes = np.append(self._alike.sum(axis=1), n_target)
            v = visits(np.append(v, v.max()), sizes, self._n_rows, constants.half_worth)[:-1]
        return np.asarray(np.maximum(v / v.max(), constants.floor))

    @property
    def n_effective(self) -> float:
        """What the pool is worth in examples: its different contents, weighed, less the wrong labels of the best
        source."""
        right = 1.0 if self.odds is None else float(1 - self.odds.wrong.min())
        return right * float(self.source_weights @ self._alike.sum(axis=1))

    @property
    def target_share(self) -> float:
        """The share of the target in a batch."""
        if not self._on_target:
            return 0.0
        if self._fixed_share is not None:
            return self._fixed_share
        return float(share_by_size(len(self._targets), self.n_effective, self._constants.most_target))

    @property
    def _alike(self) -> np.ndarray:
        """Contents of each source and group, weighed by likeness, shape (S, G)."""
        return np.einsum("slg,l->sg", self._masses, self._strata.likeness_weights)

    def cell_shares(self) -> np.ndarray:
        """The share of each cell in what is drawn from the pool, shape (S, L, G); groups keep theirs."""
        weighed = self._masses * self.source_weights[:, None, None] * self._strata.likeness_weights[:, None]
        totals = weighed.sum(axis=1).sum(axis=0)
        return weighed * np.divide(self._strata.group_shares, totals, out=np.zeros_like(totals), where=totals > 0)

    def probabilities(self) -> np.ndarray:
        """The probability of each example: how often it is drawn times its latest weight, the largest 1, shape (N,).

        An example that was never weighed has the mean weight of its source.
        """
        strata = self._strata
        per_content = np.divide(
            self.cell_shares(), self._masses, out=np.zeros_like(self._masses), where=self._masses > 0
        )
        drawn = per_content[strata.sources, strata.likeness, strata.groups] / self._cells.copies
        prior = np.ones(strata.n_sources) if self.odds is None else 1 - self.odds.wrong
        weights = np.where(np.isnan(self.weights), prior[strata.sources], self.weights)
        return np.asarray(drawn * weights / (drawn * weights).max())

    @property
    def needs_losses(self) -> bool:
        """See `Rider`: whether `DRAWN_TOGETHER` losses are to be learned from, or a window is to be drawn."""
        seen = sum(len(losses) for _, *both in self._observed for losses in both)
        drawn = sum(len(rows) for both in self._unobserved for rows in both)
        return not self._pending or seen + drawn >= DRAWN_TOGETHER

    def step(self, step: int) -> list[Batch]:
        """See `Rider`: rows of the pool come before those of the target."""
        assert self._loader is not None, "a rider without workers loads no batch"
        self.draw()
        return self._weighed(next(self._loader))

    @property
    def upcoming(self) -> list[Rows]:
        """Rows of pool and target of the next steps, all that are drawn together: at least one step."""
        if not self._pending:
            self._draw_window()
        return list(self._pending)

    def draw(self) -> Rows:
        """Rows of pool and target of the next step."""
        self._drawn = self.upcoming[0]
        del self._pending[0]
        self._unobserved.append(self._drawn)
        return self._drawn

    def log_odds(self) -> np.ndarray | None:
        """`Batch.log_odds` of the step that was drawn, float32, shape (B,), pool before target; None without odds."""
        if self.odds is None:
            return None
        pool_rows, target_rows = self._drawn
        log_odds = np.full(len(pool_rows) + len(target_rows), np.inf, dtype=np.float32)
        if self._judges:
            own = log_odds[: len(pool_rows)]
            own[:] = self.odds.log_odds(self._strata.sources[pool_rows])
            if self._numbers["rows"] >= self._learning_rows:
                # A loss is at least 0, so that the odds are at most these. NaN: never weighed, and not bounded.
                np.fmin(own, logit(self.weights[pool_rows].astype(np.float32)) + LATER_ODDS, out=own)
        return log_odds

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`. The probabilities move once `DRAWN_TOGETHER` losses are known, or before a window is drawn."""
        complete = self.needs_losses and len(self._unobserved) == 1
        pool_rows, _ = self._unobserved.pop(0)
        pool_losses = losses[: len(pool_rows)]
        self._observed.append((pool_rows, pool_losses, losses[len(pool_rows) :]))
        if complete:
            self.learn()
        self.history.step(lambda: self._point(pool_losses[np.isfinite(pool_losses)]))

    def learn(self) -> None:
        """Move the probabilities by all losses that were observed since they last moved."""
        if not self._observed:
            return
        pool_rows, pool_losses, target_losses = map(np.concatenate, zip(*self._observed, strict=True))
        self._observed = []
        judges, finite, rows = self._judges, np.isfinite(pool_losses), self._numbers["rows"]
        self._numbers["rows"] += len(pool_rows)
        pool_rows, pool_losses = pool_rows[finite], pool_losses[finite]
        if self._on_target:
            known_losses = target_losses[np.isfinite(target_losses)]
        else:
            # Without the target in its batches, a model shows what it knows on the sources that are like it.
            known_losses = pool_losses[self._source_weights[self._strata.sources[pool_rows]] >= ALIKE]
        if len(known_losses):
            known = self._numbers["known"]
            decay = np.exp(-len(known_losses) / TARGET_MEMORY) if known else 0.0
            self._numbers["known"] = float(decay * known + (1 - decay) * np.exp(-known_losses).mean())
        if rows < self._learning_rows:
            self._learn(pool_rows, pool_losses, judges)

    def ids(self, batches: list[Batch]) -> list[str]:
        """See `Rider`."""
        pool_rows, target_rows = self._drawn
        ids: list[str] = self.pool.ids.take(pool_rows).to_pylist() + self._targets.ids.take(target_rows).to_pylist()
        return ids

    def fingerprint(self) -> str:
        """See `Rider`."""
        values = [self.batch_size, self._seed, self.odds is None, self._by_source, self._on_target, self._fixed_share]
        start = int(self._numbers["target_rows"])
        digest = hashlib.sha256(f"{values} {start} {self._n_rows} {self._constants}".encode())
        first = self._target_stream.take(0, self.batch_size)
        for x in (self._masses, self._strata.group_shares, self._strata.likeness_weights, self.excess.state(), first):
            digest.update(np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """See `Rider`."""
        arrays = {f"cells/{name}": x for name, x in self._cells.state().items()}
        arrays |= {
            "numbers": np.array([self._numbers[name] for name in NUMBERS]),
            "excess": self.excess.state(),
            "weights": self.weights,
            "course": self.history.state(),
            "pending": np.array([len(x) for pair in self._pending for x in pair], dtype=np.int64),
            "pending rows": np.concatenate([np.empty(0, dtype=np.int64), *(x for p in self._pending for x in p)]),
        }
        for name, parts in zip(OBSERVED, zip(*self._observed, strict=True), strict=False):
            arrays[name] = np.concatenate(parts)
        if self.odds is not None:
            arrays["wrong"] = self.odds.wrong
        return {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Rider`."""
        arrays = {name: x.numpy() for name, x in state.items()}
        self._numbers = dict(zip(NUMBERS, arrays["numbers"].tolist(), strict=True))
        self._cells.restore({n.removeprefix("cells/"): x for n, x in arrays.items() if n.startswith("cells/")})
        self.excess.restore(arrays["excess"])
        self.weights = arrays["weights"].copy()
        self.history.restore(arrays["course"])
        if self.odds is not None:
            self.odds.wrong = arrays["wrong"].copy()
        self._source_weights = self._new_source_weights()
        self._observed = [tuple(arrays[name] for name in OBSERVED)] if OBSERVED[0] in arrays else []
        ends = np.cumsum(arrays["pending"])
        pieces = np.split(arrays["pending rows"], ends[:-1]) if len(ends) else []
        self._pending = list(zip(pieces[::2], pieces[1::2], strict=True))
        self._load()

    @property
    def _judges(self) -> bool:
        """Whether the model knows enough of the target to judge the labels of the pool."""
        return self.odds is not None and self._numbers["known"] >= KNOWS

    def _learn(self, rows: np.ndarray, losses: np.ndarray, judges: bool) -> None:
        sources, right = self._strata.sources[rows], np.ones(len(rows))
        if self.odds is not None and judges:
            right = self.odds.weights(sources, losses)
            self.weights[rows] = right
            self.odds.update(sources, right)
        if self._by_source and self._on_target and not self._constants.drop:
            self.excess.add(losses, sources, self._strata.groups[rows], 1 / self.source_weights[sources], right)
        self._source_weights = self._new_source_weights()

    def _weighed(self, batches: list[Batch]) -> list[Batch]:
        """The batches with the log odds of their examples; those of the target have the weight 1."""
        log_odds = self.log_odds()
        if log_odds is None:
            return batches
        parts = torch.from_numpy(log_odds).split([len(batch) for batch in batches])
        return [replace(batch, log_odds=part) for batch, part in zip(batches, parts, strict=True)]

    def _draw_window(self) -> None:
        """Draw the next batches, as many as are sorted by length together, or as are drawn together."""
        count, size = self._window, self._window * self.batch_size
        # What the share of the target leaves over goes to later windows.
        owed = self._numbers["target_owed"] + self.target_share * size
        n_target = min(size, max(0, round(owed)))
        self._numbers["target_owed"] = owed - n_target
        pool_rows = np.empty(0, dtype=np.int64)
        if n_target < size:
            pool_rows = self._cells.take(self.cell_shares().ravel(), size - n_target)
        target_rows = self._target_stream.take(int(self._numbers["target_rows"]), n_target)
        self._numbers["target_rows"] += n_target
        n_pool = (len(pool_rows) + np.arange(count)) // count
        if self._lengths is None:
            # Dealt in turn, so that each batch gets its part of every cell; of the pool the last batches get one more.
            pools = [pool_rows[k::count] for k in reversed(range(count))]
            targets = [target_rows[k::count] for k in range(count)]
        else:
            pool_lengths, target_lengths = self._lengths
            generator = np.random.default_rng((self._seed, int(self._numbers["windows"])))
            pool_rows = self._in_turn(pool_rows)
            visits = max(n_target / len(self._targets), len(pool_rows) / max(1.0, self.n_effective))
            pools, targets = [], []
            for batches in np.array_split(np.arange(count), min(count, max(1, round(visits)))):
                pools += _dealt(pool_rows, pool_lengths, n_pool, batches, generator)
                targets += _dealt(target_rows, target_lengths, self.batch_size - n_pool, batches, generator)
        self._pending = list(zip(pools, targets, strict=True))
        self._load()
        self._numbers["windows"] += 1

    def _in_turn(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the pool, which come cell by cell, so that every stretch of them holds its part of every cell."""
        _, first, numbers = np.unique(self._strata.cells_of(rows), return_index=True, return_counts=True)
        sizes = numbers[np.argsort(first)]
        ranks = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return rows[np.argsort((ranks + 0.5) / np.repeat(sizes, sizes), kind="stable")]

    def _load(self) -> None:
        if self._loader is not None:
            self._loader.begin(self._pending)

    def _point(self, losses: np.ndarray) -> HistoryPoint:
        """The present state of the outer loop, for its history; `losses` are those of the last pool examples."""
        shares = self.cell_shares()
        wrong = np.zeros(self._strata.n_sources) if self.odds is None else self.odds.wrong
        return HistoryPoint(
            source_shares=shares.sum(axis=1).sum(axis=1) / shares.sum(),
            signal=self.excess.mean,
            stderr=self.excess.stderr,
            wrong=wrong,
            target_share=self.target_share,
            n_effective=self.n_effective,
            training_loss=float(losses.mean()) if len(losses) else np.nan,
            reachable_loss=self.excess.reachable(self._strata.group_shares),
        )


def steps_drawn_together(pool: Pool, target: Pool, batch_size: int) -> int:
    """Number of steps whose rows are drawn together, with the probabilities of that moment."""
    if _lengths(pool, target) is None:
        return -(-DRAWN_TOGETHER // batch_size)
    return max(1, min(WINDOW, len(pool) // batch_size))


def _lengths(pool: Pool, target: Pool) -> tuple[np.ndarray, np.ndarray] | None:
    """Lengths of the examples of both, or None if those of one have none."""
    pool_lengths, target_lengths = lengths(pool), lengths(target)
    return None if pool_lengths is None or target_lengths is None else (pool_lengths, target_lengths)


def _dealt(
    rows: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, batches: np.ndarray, generator: Generator
) -> list[np.ndarray]:
    """The rows of some batches in a row, sorted `by_length`; which of these batches are long is drawn.

    Such a stretch holds each example about once, so that its visits are spread over the run.

    Args:
        rows: of all batches. sizes: rows in each batch, shape (n,). batches: numbers of those that are wanted.
    """
    start, count = int(sizes[: batches[0]].sum()), int(sizes[batches].sum())
    order = generator.permutation(len(batches))
    ours = by_length(rows[start : start + count], lengths)
    pieces = np.split(ours, np.cumsum(sizes[batches][order])[:-1])
    return [pieces[k] for k in np.argsort(order)]
