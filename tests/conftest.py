"""What the tests share: one thread, no network, and tiny tasks that train in milliseconds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads of this process and of those that it starts: more of them wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn import functional

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.recipe import TrainConfig
from cads.task import Metrics, Task
from cads.tasks.language.tokens import IGNORED, Tokens
from cads.tasks.vision.images import ImageTensors
from cads.tasks.vision.networks import Network
from cads.tasks.vision.task import VisionTask
from tests.support.noisy_digits import noisy_digits

pytest.register_assert_rewrite("tests.support.forked_processes", "tests.support.killed_runs")
torch.set_num_threads(1)
settings.register_profile("same examples every time", derandomize=True, deadline=None)
settings.load_profile("same examples every time")

N_FEATURES, N_CLASSES, N_WORDS, N_TOKENS = 6, 3, 12, 60
WIDTH = 4
"""Features of a word."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


class Rows:
    """Examples that are rows of one array and an answer each; rows may be padded with -1 at their ends.

    A batch is as wide as its longest row.
    """

    def __init__(self, rows: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> None:
        self.rows, self.labels, self.lengths = rows, labels, lengths

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: np.ndarray) -> Batch:
        longest = int(self.lengths[positions].max())
        return Batch(
            inputs={"x": torch.from_numpy(self.rows[positions, :longest])},
            labels=torch.from_numpy(self.labels[positions]),
            positions=torch.from_numpy(positions),
            tokens=longest * len(positions),
            answer_tokens=len(positions),
        )

    def take(self, positions: np.ndarray) -> Rows:
        return Rows(self.rows[positions], self.labels[positions], self.lengths[positions])

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        _, representatives, codes = np.unique(self.lengths, return_index=True, return_inverse=True)
        return representatives, codes

    def digests(self) -> list[bytes]:
        return [hashlib.sha256(row.tobytes()).digest() for row in self.rows]

    def label_digest(self) -> bytes:
        return hashlib.sha256(self.labels.tobytes()).digest()


class Words(nn.Module):
    """Scores of the classes from the mean over the words of a sentence; it trains one by one, not batched."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(N_WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, 5)
        self.head = nn.Linear(5, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        present = (x >= 0).unsqueeze(-1)
        hidden = torch.relu(self.inner(self.table(x.clamp(min=0)))) * present
        return self.head(hidden.sum(dim=1) / present.sum(dim=1))


class TinyTask(Task):
    """Classification of rows: features (an MLP reads them) or sentences (of 3, 5 or 8 words). No images."""

    outer = "loss"

    def __init__(self, pools: Sequence[Pool], recipe: TrainConfig, build: Callable[[], nn.Module]) -> None:
        self.pool, self.target, self.test = pools
        self.recipe = recipe
        self.name = "tiny"
        self._build = build

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._build()

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch.inputs["x"]), batch.labels, reduction="none")

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        model.eval()
        with torch.inference_mode():
            device = next(model.parameters()).device
            losses = torch.cat([self.losses(model, batch.to(device)) for batch in pool.batches(100)])
        return {"loss": float(losses.mean())}


class NextToken(nn.Module):
    """Scores of the next token from the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(N_TOKENS, WIDTH)
        self.inner = nn.Linear(WIDTH, 6)
        self.head = nn.Linear(6, N_TOKENS)

    def hidden(self, tokens: Tensor) -> Tensor:
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        return torch.relu(self.inner(self.table(tokens).cumsum(dim=1) / steps))


class TextTask(TinyTask):
    """Token sequences of many lengths, each with a question as text and a few answer tokens at its end."""

    def losses(self, model: Any, batch: Batch) -> Tensor:
        logits = model.head(model.hidden(batch.inputs["input_ids"]))[:, :-1].transpose(1, 2)
        losses = functional.cross_entropy(logits, batch.labels[:, 1:], ignore_index=IGNORED, reduction="none")
        return losses.sum(dim=1) / (batch.labels[:, 1:] != IGNORED).sum(dim=1).clamp(min=1)

    def features(self, model: Any, batch: Batch) -> Tensor:
        present = batch.inputs["attention_mask"][..., None]
        return (model.hidden(batch.inputs["input_ids"]) * present).sum(dim=1) / present.sum(dim=1)

    def texts(self, pool: Pool) -> list[str]:
        return pool.examples.texts.to_pylist()

    def subtasks(self, pool: Pool) -> np.ndarray | None:
        return pool.examples.subtasks


def token_pool(name: str, n: int, *, sources: tuple[str, ...] = (), subtasks: int = 0) -> Pool:
    rng = np.random.default_rng(sum(map(ord, name)))
    sizes = rng.integers(5, 40, n)
    ids = np.minimum(rng.geometric(0.1, sizes.sum()), N_TOKENS) - 1
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    learned = np.concatenate([np.arange(size) >= size - 3 for size in sizes])
    texts = [" ".join(f"Word{i}" for i in ids[a : b - 3]) + "?" for a, b in pairwise(offsets)]
    groups = rng.permutation(np.arange(n) % subtasks) if subtasks else None
    tokens = Tokens(ids.astype(np.int32), learned, offsets, pa.array(texts), groups)
    codes = np.arange(n) * len(sources) // n if sources else None
    return Pool([f"{name}-{i}" for i in range(n)], tokens, codes, sources, name=name)


def feature_pool(name: str, n: int, sources: int = 0) -> Pool:
    """Clusters, one a class; the labels of the later sources are wrong more often."""
    rng = np.random.default_rng(sum(map(ord, name)))
    labels = rng.integers(0, N_CLASSES, n)
    rows = (rng.normal(size=(n, N_FEATURES)) + 2 * np.eye(N_CLASSES, N_FEATURES)[labels]).astype(np.float32)
    codes = np.arange(n) * sources // n if sources else None
    if codes is not None:
        wrong = rng.random(n) < 0.9 * codes / sources
        labels = np.where(wrong, rng.integers(0, N_CLASSES, n), labels)
    names = [f"source {s}" for s in range(sources)]
    return Pool([f"{name}-{i}" for i in range(n)], Rows(rows, labels, np.full(n, N_FEATURES)), codes, names, name=name)


def sentence_pool(name: str, n: int) -> Pool:
    rng = np.random.default_rng(sum(map(ord, name)))
    lengths = rng.choice([3, 5, 8], n)
    rows = rng.integers(0, N_WORDS, (n, 8))
    rows[np.arange(8) >= lengths[:, None]] = -1
    return Pool([f"{name}-{i}" for i in range(n)], Rows(rows, rows[:, 0] % N_CLASSES, lengths), name=name)


def image_pool(name: str, n: int) -> Pool:
    rng = np.random.default_rng(sum(map(ord, name)))
    labels = rng.integers(0, N_CLASSES, n)
    centres = np.random.default_rng(0).integers(60, 196, (N_CLASSES, 1, 5, 5))
    pixels = (centres[labels] + 20 * rng.normal(size=(n, 1, 5, 5))).clip(0, 255).astype(np.uint8)
    images = ImageTensors(torch.from_numpy(pixels), torch.from_numpy(labels))
    return Pool([f"{name}-{i}" for i in range(n)], images, name=name)


def mlp(hidden: int, dropout: float) -> nn.Module:
    layers = [nn.Linear(N_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, N_CLASSES)]
    return nn.Sequential(*layers[:2], nn.Dropout(dropout), layers[2]) if dropout else nn.Sequential(*layers)


@pytest.fixture(scope="session")
def features() -> Callable[..., TinyTask]:
    """Makes a task on rows of features with an MLP: `features(hidden=8, dropout=0.0, n=200, **recipe)`."""

    def make(*, hidden: int = 8, dropout: float = 0.0, n: int = 200, sources: int = 4, **recipe: Any) -> TinyTask:
        pools = feature_pool("pool", n, sources), feature_pool("target", 60), feature_pool("test", 60)
        return TinyTask(pools, TrainConfig(**recipe), partial(mlp, hidden, dropout))

    return make


@pytest.fixture(scope="session")
def sentences() -> Callable[..., TinyTask]:
    """Makes a task on sentences of 3, 5 or 8 words, whose costs differ: `sentences(**recipe)`."""

    def make(**recipe: Any) -> TinyTask:
        pools = sentence_pool("pool", 150), sentence_pool("target", 40), sentence_pool("test", 40)
        return TinyTask(pools, TrainConfig(**recipe), Words)

    return make


@pytest.fixture(scope="session")
def texts() -> Callable[..., TextTask]:
    """Makes a task on questions and answers from two sources: `texts(n=80, subtasks=3, **recipe)`."""

    def make(*, n: int = 80, subtasks: int = 3, **recipe: Any) -> TextTask:
        pools = (
            token_pool("pool", n, sources=("clean", "noisy")),
            token_pool("target", 20, subtasks=subtasks),
            token_pool("test", 20),
        )
        return TextTask(pools, TrainConfig(**recipe), NextToken)

    return make


@pytest.fixture(scope="session")
def images() -> Callable[..., VisionTask]:
    """Makes a vision task on 5x5 grey images: `images(model="mlp", **recipe)`."""

    def make(*, model: str = "mlp", **recipe: Any) -> VisionTask:
        network = Network(model, hidden=8, channels=2)
        return VisionTask(
            image_pool("pool", 200),
            target=image_pool("target", 60),
            test=image_pool("test", 60),
            classes="abc",
            build_model=partial(network.build, (1, 5, 5), N_CLASSES),
            recipe=TrainConfig(**recipe),
        )

    return make


@pytest.fixture
def task(features) -> TinyTask:
    """Rows of features and an MLP, where a module has no task of its own."""
    return features(hidden=8, n=60, batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def noisy() -> VisionTask:
    """Digits of which about half are mislabelled; the truth is in `task.truth.corrupted`."""
    return noisy_digits()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Language models without weights, and examples: what `build` builds on."""
    from tests.support.language_tasks import write_language

    return write_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def build(folder) -> Callable[..., Task]:
    """Makes a language task: `build(family="llama", data="sums", recipe=None, **options)`."""
    from tests.support.language_tasks import language_task

    return partial(language_task, folder)


@pytest.fixture
def small_shards(monkeypatch) -> None:
    """Text and tokens are read a few rows at a time."""
    from cads.tasks.language import rows as rows_module
    from cads.tasks.language import tokens as tokens_module

    monkeypatch.setattr(rows_module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(tokens_module, "SEQUENCES_AT_ONCE", 3)
    monkeypatch.setattr(tokens_module, "TOKENS_AT_ONCE", 64)


@pytest.fixture
def rows(tmp_path) -> Any:
    """30 sums, as `cads.tasks.language.rows.Rows`."""
    from tests.support.token_caches import rows_of_sums

    return rows_of_sums(tmp_path)


@pytest.fixture
def fetch(tmp_path, rows) -> Callable[..., Tokens]:
    """Fetches 30 sums: `fetch(tokenizer, rows, longest=..., separator=..., chat=..., drop=...)`."""
    from tests.support.token_caches import fetch_tokens

    return partial(fetch_tokens, tmp_path / "cache", rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A dictionary of 150 entries, and 60 articles in place of the packages."""
    from tests.support.tiny_corpora import write_corpora

    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def packages(world, monkeypatch) -> None:
    """The corpora are those of `world`."""
    monkeypatch.setattr("experiments.corpora._package", lambda corpus, name: world / name)
