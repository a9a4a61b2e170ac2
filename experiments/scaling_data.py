"""Pools of any size for the growth curves: noisy digits in a mapped file, and texts whose words follow Zipf's law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.nn import functional

from cads.data.batch import Batch
from cads.data.hashing import SIZE, row_digests
from cads.data.pool import Pool
from cads.recipe import TrainConfig
from cads.task import Metrics, Task
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.datasets import load_digits

PIECE = 2**16
"""Examples that are generated at once."""
PIXEL_NOISE, LABEL_NOISE = 24.0, 0.4
"""Standard deviation of the noise on grey levels; share of the labels that are drawn anew."""
N_TARGET, N_TEST = 1000, 2000
VOCABULARY, EXPONENT = 200_000, 1.1
"""Number of words, and the exponent of Zipf's law for their frequencies."""
SHORTEST, LONGEST = 10, 60
"""Words of the shortest and of the longest text."""
LONGEST_WORD = 7
"""Characters of the last word of the vocabulary, `w199999`, which is among the longest."""
WIDTH, HASHED = 64, 512
"""Features of a text, and buckets to which its words are hashed."""


def write_digits(folder: Path, n: int) -> None:
    """Write images.npy and labels.npy of n noisy digits 8x8, a piece at a time: the files are never whole in memory."""
    folder.mkdir(parents=True)
    digits = load_digits().train
    pixels, labels = digits.pixels(np.arange(len(digits))).numpy()[:, 0], digits.labels.numpy()
    images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(n, 8, 8))
    answers = np.lib.format.open_memmap(folder / "labels.npy", mode="w+", dtype=np.uint8, shape=(n,))
    for start in range(0, n, PIECE):
        rng = np.random.default_rng((start, 0))
        stop = min(start + PIECE, n)
        chosen = rng.integers(0, len(labels), stop - start)
        noise = PIXEL_NOISE * rng.standard_normal((stop - start, 8, 8), dtype=np.float32)
        images[start:stop] = (pixels[chosen] + noise).clip(0, 255)
        wrong = rng.random(stop - start) < LABEL_NOISE
        answers[start:stop] = np.where(wrong, rng.integers(0, 10, stop - start), labels[chosen])
    images.flush()
    answers.flush()


def digit_config(folder: Path, n: int) -> VisionConfig:
    """The vision task on the files of `write_digits`, with a tiny network."""
    return VisionConfig(
        dataset="arrays", path=str(folder), model="mlp", hidden=32, n_target=N_TARGET, n_test=N_TEST,
        n_pool=n - N_TARGET - N_TEST,
    )  # fmt: skip


def write_texts(path: Path, n: int) -> None:
    """Write an Arrow file of n texts of `SHORTEST` to `LONGEST` words, a piece at a time."""
    frequency = 1.0 / np.arange(1, VOCABULARY + 1) ** EXPONENT
    cumulative = np.cumsum(frequency) / frequency.sum()
    words = pa.array([f"w{i}" for i in range(VOCABULARY)])
    schema = pa.schema({"text": pa.string()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, n, PIECE):
            rng = np.random.default_rng((start, 1))
            sizes = rng.integers(SHORTEST, LONGEST + 1, min(PIECE, n - start))
            drawn = np.searchsorted(cumulative, rng.random(sizes.sum())).astype(np.int32)
            ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(ends), words.take(pa.array(drawn)))
            writer.write_batch(pa.record_batch([pc.binary_join(lists, " ")], schema=schema))


class Texts:
    """Texts in a mapped Arrow file, as the payload of a pool.

    Args:
        chunks: the column, of which all chunks but the last hold `PIECE` rows.
        rows: positions of the texts in the column, int64, shape (N,).
    """

    def __init__(self, chunks: list[pa.Array], rows: np.ndarray) -> None:
        self._chunks, self._rows = chunks, rows

    @classmethod
    def of(cls, path: Path) -> Texts:
        """The texts of a file of `write_texts`."""
        chunks = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("text").chunks
        return cls(chunks, np.arange(sum(map(len, chunks))))

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> pa.Array:
        """All texts, in order; neighbouring rows of one chunk are read together."""
        chunk, row = np.divmod(self._rows, PIECE)
        starts = np.flatnonzero(np.diff(chunk, prepend=-1))
        pieces = zip(chunk[starts], np.split(row, starts[1:]), strict=True)
        return pa.concat_arrays([self._chunks[i].take(pa.array(rows)) for i, rows in pieces])

    def batch(self, positions: np.ndarray) -> Batch:
        """Hashed words: input "x" is the share of a text's words in each of `HASHED` buckets, shape (B, HASHED)."""
        words = pc.split_pattern(self.take(positions).texts(), " ")
        coded = words.flatten().dictionary_encode()
        letters = np.array(coded.dictionary.to_pylist(), dtype=f"S{LONGEST_WORD}")
        _, _, hashes = row_digests(letters.view(np.uint8).reshape(len(letters), -1)).buffers()
        bucket_hashes = np.frombuffer(hashes, np.uint8)[: SIZE * len(letters)].view("<u4")[:: SIZE // 4]
        sizes = np.diff(words.offsets.to_numpy())
        column = (bucket_hashes % HASHED)[coded.indices.to_numpy()]
        cells = np.repeat(np.arange(len(sizes)), sizes) * HASHED + column
        counts = np.bincount(cells, minlength=len(sizes) * HASHED).reshape(-1, HASHED) / sizes[:, None]
        n = len(positions)
        labels = torch.zeros(n, dtype=torch.int64)
        return Batch({"x": torch.from_numpy(counts).float()}, labels, torch.as_tensor(positions), n, n)

    def take(self, positions: np.ndarray) -> Texts:
        """The texts at `positions`; no text is read."""
        return Texts(self._chunks, self._rows[positions])

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """All hashed texts cost the same."""
        return np.zeros(1, dtype=np.int64), np.zeros(len(self), dtype=np.int64)

    def digests(self) -> pa.Array:
        """A hash of each text, which is padded to the longest possible text."""
        width = LONGEST * (LONGEST_WORD + 1)
        digests = []
        for start in range(0, len(self), PIECE):
            texts = self.take(np.arange(start, min(start + PIECE, len(self)))).texts()
            padded = pc.utf8_rpad(texts, width)
            ends = np.frombuffer(padded.buffers()[1], np.int32)[: len(texts) + 1]
            rows = np.frombuffer(padded.buffers()[2], np.uint8)[ends[0] : ends[-1]]
            digests.append(row_digests(rows.reshape(len(texts), width)))
        return pa.concat_arrays(digests)

    def label_digest(self) -> bytes:
        """Nothing: there are no labels."""
        return b""


class TextTask(Task):
    """Texts without answers, for selectors that compare words or random features of them."""

    name = "zipfian texts"

    def __init__(self, path: Path) -> None:
        texts = Texts.of(path)
        everything = np.arange(len(texts))
        parts = np.split(everything, [N_TARGET, 2 * N_TARGET])
        names = ("target", "test set", "pool")
        digits = pc.utf8_lpad(pa.array(everything).cast(pa.string()), 10, "0")
        ids = pc.binary_join_element_wise(pa.scalar("t"), digits, "-")
        pools = [
            Pool(ids.take(pa.array(rows)), texts.take(rows), name=name) for rows, name in zip(parts, names, strict=True)
        ]
        self.target, self.test, self.pool = pools
        self.recipe = TrainConfig(batch_size=256)

    def model(self, seed: int) -> nn.Module:
        """Random features of hashed words, and an untrained head."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(nn.Linear(HASHED, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

    def losses(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Cross-entropy against a constant label."""
        return functional.cross_entropy(model(batch.inputs["x"]), batch.labels, reduction="none")

    def features(self, model: Any, batch: Batch) -> Tensor:
        """The hidden units, shape (B, WIDTH)."""
        features: Tensor = model[1](model[0](batch.inputs["x"]))
        return features

    def texts(self, pool: Pool) -> list[str]:
        """The texts of a pool."""
        assert isinstance(pool.examples, Texts)
        texts: list[str] = pool.examples.texts().to_pylist()
        return texts

    def metrics(self, model: nn.Module, pool: Pool) -> Metrics:
        """The mean loss on a pool."""
        with torch.inference_mode():
            return {"loss": float(torch.cat([self.losses(model, b) for b in pool.batches(PIECE)]).mean())}
