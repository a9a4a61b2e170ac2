"""The steps that are measured on a pool of n examples: seconds and peak memory of each, in a separate process."""

from __future__ import annotations

import re
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from baselines.bm25 import Bm25
from baselines.embedding import Embedding
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.ids import rank_by_score
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream, WeightedStream
from cads.data.subsample import subsample
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import project_capped_simplex
from cads.recipe import TrainConfig
from cads.scoring.score_files import ScoreWriter
from cads.scoring.top_k import best_of_files
from cads.selection import Selection
from cads.selectors.online.selector import Cads
from cads.tasks.vision.images import ImageArrays
from experiments.scaling_data import TextTask, digit_config, write_digits, write_texts

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
UPDATES = 9
"""Updates of a policy, of which the fastest counts: other jobs on the machine interrupt some."""
WHOLE_UPDATE = "draw, log-probability, score, step"
"""Name of the step that is a whole outer update of a policy."""
SELECTED = 0.3
"""Share of the pool that a policy may select in expectation."""
STEPS, BATCH = 2000, 64
"""Training steps whose examples are drawn, and examples in each."""
TOP_K = 10_000
"""Examples that an external top-k keeps."""
PIECE = 2**18
"""Scores that are generated at once."""
PASSES = 1
"""Budget of `cads`, in passes over the pool."""
T = TypeVar("T")


@dataclass
class Row:
    """One step on n examples.

    Attributes:
        section, step: their names. n: examples of the pool. seconds: that the step took.
        extra: bytes at the peak of the step beyond those in memory before it.
        peak: bytes of the process at that peak, mapped files included. flops: charged to the ledger.
    """

    section: str
    step: str
    n: int
    seconds: float
    extra: int
    peak: int
    flops: float = 0.0


class Meter:
    """Measures the steps of one section."""

    def __init__(self, section: str, n: int) -> None:
        self._section, self._n = section, n
        self.rows: list[Row] = []

    def __call__(self, step: str, work: Callable[[], T]) -> T:
        """Do `work` and add its row; returns its result."""
        before = _memory("VmRSS")
        CLEAR.write_text("5")  # Resets VmHWM, so that the peak is that of `work`.
        start = time.perf_counter()
        result = work()
        seconds, peak = time.perf_counter() - start, _memory("VmHWM")
        self.rows.append(Row(self._section, step, self._n, seconds, max(0, peak - before), peak))
        return result

    def arrays(self, step: str, work: Callable[[], T]) -> T:
        """The same for work on numpy arrays alone: the best of `UPDATES` times, and exactly the bytes it allocates.

        The memory of the process would not show them, since arrays may reuse memory that was freed before.
        """
        times = []
        for _ in range(UPDATES):
            start = time.perf_counter()
            result = work()
            times.append(time.perf_counter() - start)
            del result
        tracemalloc.start()
        result = work()
        extra = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.rows.append(Row(self._section, step, self._n, min(times), extra, _memory("VmHWM")))
        return result

    def charged(self, flops: float) -> None:
        """Add the FLOPs of the last step to its row."""
        self.rows[-1].flops = flops


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024


def policy(n: int, folder: Path) -> list[Row]:
    """One outer update of a policy over n examples: draw, log-probability, score, projected step."""
    meter, rng = Meter("policy", n), np.random.default_rng(0)
    start = BernoulliPolicy(project_capped_simplex(SELECTED * rng.random(n), SELECTED * n), cap=SELECTED * n)

    def update() -> None:
        masks = start.sample(1, rng)
        start.log_prob(masks)
        # The step raises most probabilities, so that the projection has to enforce the cap.
        gradient = start.score(masks)[0]
        gradient -= 1.0
        start.step(gradient, 1e-3)

    meter.arrays(WHOLE_UPDATE, update)
    masks = meter.arrays("draw alone", lambda: start.sample(1, rng))
    meter.arrays("log-probability alone", lambda: start.log_prob(masks))
    gradient = meter.arrays("score alone", lambda: start.score(masks))[0]
    gradient -= 1.0
    meter.arrays("step with projection alone", lambda: start.step(gradient, 1e-3))
    return meter.rows


def pool(n: int, folder: Path) -> list[Row]:
    """A pool of images in a mapped file, and the training steps drawn from it."""
    meter = Meter("pool", n)
    write_digits(folder / "digits", n)
    images = np.load(folder / "digits" / "images.npy", mmap_mode="r")
    labels = np.load(folder / "digits" / "labels.npy").astype(np.int64)
    ids = _ids(n)
    sources = (np.arange(n) % 5).astype(np.int32)
    images_pool = meter("ids are unique", lambda: Pool(ids, ImageArrays([images], labels), sources, "abcde"))
    meter("content hashes of all examples", lambda: images_pool.digests)
    meter("content hash of the pool", lambda: images_pool.content_hash)
    meter("copies of each other", lambda: images_pool.content_codes)
    meter("a tenth of each source", lambda: subsample(images_pool, 0.1, 0))
    positions = np.arange(n)
    epochs = meter("stream by epochs", lambda: ShuffledStream(positions, 0))
    meter(
        f"{STEPS} batches of {BATCH}", lambda: [images_pool.batch(epochs.take(i * BATCH, BATCH)) for i in range(STEPS)]
    )
    weights = np.random.default_rng(0).random(n)
    weighted = meter("stream by weight", lambda: WeightedStream(weights, 0))
    meter(
        f"{STEPS} batches by weight", lambda: [images_pool.batch(weighted.take(i * BATCH, BATCH)) for i in range(STEPS)]
    )
    return meter.rows


def selection(n: int, folder: Path) -> list[Row]:
    """A Selection of n examples: ranked, hashed, saved, loaded, applied."""
    meter, rng = Meter("selection", n), np.random.default_rng(0)
    ids, score = _ids(n), rng.random(n)
    sources = pa.DictionaryArray.from_arrays(pa.array((np.arange(n) % 5).astype(np.int32)), list("abcde"))
    meter("ranking", lambda: rank_by_score(ids, score))
    ranked = Selection(ids, score, score, score > 0.5, "scaling", 0, Budget(1.0), Ledger(), "", sources)
    meter("content hash", lambda: ranked.content_hash)
    meter("save", lambda: ranked.save(folder / "selection"))
    loaded = meter("load", lambda: Selection.load(folder / "selection"))
    meter("table by source", loaded.source_counts)
    return meter.rows


def scores(n: int, folder: Path) -> list[Row]:
    """n scores streamed to Parquet, and the best of them by one pass over the file."""
    meter, path = Meter("scores", n), folder / "scores.parquet"

    def write() -> None:
        with ScoreWriter(path) as writer:
            for start in range(0, n, PIECE):
                count = min(PIECE, n - start)
                writer.write(_ids(count, start), np.random.default_rng(start).random(count))

    meter("stream to Parquet", write)
    meter(f"the best {TOP_K:,}", lambda: best_of_files([path], TOP_K))
    return meter.rows


def cads(n: int, folder: Path) -> list[Row]:
    """`cads` end to end on n images in a mapped file: from the file to a Selection that holds the trained model."""
    meter, ledger = Meter("cads", n), Ledger()
    write_digits(folder / "digits", n)
    recipe = TrainConfig(batch_size=256, learning_rate=3e-3)
    task = meter("task from the mapped file", lambda: digit_config(folder / "digits", n).build(recipe))
    meter("leaks are looked for", task.check)
    budget = Budget(PASSES, "epochs")
    selected = meter("select", lambda: Cads().select(task, budget, seed=0, ledger=ledger))
    meter.charged(ledger.total().flops)
    meter("save", lambda: selected.save(folder / "selection"))
    return meter.rows


def texts(n: int, folder: Path) -> list[Row]:
    """BM25, and embeddings by random features of hashed words, on n texts in a mapped file."""
    meter = Meter("texts", n)
    write_texts(folder / "texts.arrow", n)
    task = meter("task from the mapped file", lambda: TextTask(folder / "texts.arrow"))
    meter("content hash of the pool", lambda: task.pool.content_hash)
    for method, name in ((Bm25(), "BM25"), (Embedding(), "embedding")):
        ledger = Ledger()
        meter(name, partial(method.rank, task, seed=0, ledger=ledger))
        meter.charged(ledger.total(SELECT).flops)
    return meter.rows


def _ids(n: int, start: int = 0) -> pa.Array:
    """Ids of 15 characters."""
    digits = pc.utf8_lpad(pa.array(np.arange(start, start + n)).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise(pa.scalar("train"), digits, "-")


SECTIONS: dict[str, Callable[[int, Path], list[Row]]] = {
    "policy": policy,
    "pool": pool,
    "selection": selection,
    "scores": scores,
    "cads": cads,
    "texts": texts,
}
"""The sections that can be measured, by name."""
