"""Spaces in which examples are compared: a task's own features, a torchvision backbone's, or a sentence encoder's.

Each gives the vectors of a pool batch by batch, so that no more of them are in memory than the caller keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cads.accounting.measured import Counted, count_flops
from cads.data.pool import Pool
from cads.data.token_batches import budget_batches, scoring_batches
from cads.errors import ConfigError
from cads.runtime.signals import Interrupted
from cads.scoring.pool_scores import planned_flops
from cads.scoring.reference_models import device_of
from cads.task import Task
from cads.tasks.vision.networks import Network
from cads.tasks.vision.task import VisionTask

TOKENIZED = 1024
"""Texts whose tokens are in memory at once while their lengths are looked up."""
N_UNUSED = 2
"""Classes of a backbone, whose scores nobody looks at."""
COUNTED_LENGTHS = (8, 16, 32)
"""Lengths at which an encoder is counted. Attention makes its cost quadratic in the length: three say it all."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of some examples of a pool.

    Attributes:
        vectors: shape (B, D). flops: what they cost. tokens: of the batch, padding included.
    """

    vectors: Tensor
    flops: float
    tokens: int


@dataclass(frozen=True)
class _Cut:
    """The tokens of each text of a pool (shape (N,)), and the batches they are encoded in."""

    length: np.ndarray
    batches: list[np.ndarray]

    def width(self, positions: np.ndarray) -> int:
        """Tokens to which a batch is padded."""
        return int(self.length[positions].max())


class Encoder(ABC):
    """Where examples are vectors.

    Attributes:
        dimension: D.
    """

    dimension: int

    @abstractmethod
    def batches(self, pool: Pool) -> list[np.ndarray]:
        """All positions of `pool`, as they are encoded together."""

    @abstractmethod
    def encode(self, pool: Pool, positions: np.ndarray) -> Encoded:
        """The vectors of one batch, without gradients."""

    @abstractmethod
    def flops(self, pool: Pool) -> float:
        """What encoding all of `pool` will cost."""


class FeatureEncoder(Encoder):
    """What the last layer of a model reads, by `Task.features`.

    Args:
        task: whose features they are.
        counted: a model of the same shapes on which FLOPs are counted, on the CPU or on the meta device.
        tokens: padded tokens of a batch.

    Attributes:
        model: gives the vectors; to be set before the first `encode`.

    Raises:
        ConfigError: if the model has no features.
    """

    def __init__(self, task: Task, counted: nn.Module, tokens: int) -> None:
        self._task, self._tokens = task, tokens
        self.model: nn.Module | None = None
        counted.eval()
        device = device_of(counted)
        self._price = Counted(lambda batch: task.features(counted, batch.to(device)))
        with torch.no_grad():
            probe = task.pool.batch(np.zeros(1, dtype=np.int64))
            self.dimension = int(task.features(counted, probe.to(device)).shape[1])

    def batches(self, pool: Pool) -> list[np.ndarray]:
        """By token budget; see `Encoder`."""
        return scoring_batches(pool, tokens=self._tokens)

    def encode(self, pool: Pool, positions: np.ndarray) -> Encoded:
        """Features in evaluation mode; see `Encoder`."""
        assert self.model is not None
        batch = pool.batch(positions)
        flops = self._price(batch)
        with torch.inference_mode():
            vectors = self._task.features(self.model.eval(), batch.to(device_of(self.model)))
        return Encoded(vectors, flops, batch.tokens)

    def flops(self, pool: Pool) -> float:
        """Counted once per shape; see `Encoder`."""
        return planned_flops(self._price, pool, tokens=self._tokens)


class SentenceEncoder(Encoder):
    """A sentence-transformers model, fed in length-sorted batches by token budget.

    Vectors are those of its `encode`: behind its default prompt, and of its `truncate_dim` if it has one.

    Args:
        task: whose texts are encoded.
        name: of the model on the hub, or its folder.
        tokens: padded tokens of a batch.

    Raises:
        ConfigError: if the task has no texts, sentence-transformers is not installed, or the model cannot be loaded or
            reads no sequences of tokens.
    """

    def __init__(self, task: Task, name: str, tokens: int) -> None:
        task.texts(task.target)  # A task without texts says so before the encoder is loaded.
        self._task, self._tokens = task, tokens
        self._model = load_encoder(name)
        self._prompt = self._model.prompts.get(self._model.default_prompt_name)
        self._check(name)
        self._law = self._count()
        self._cuts: dict[Pool, _Cut] = {}

    def batches(self, pool: Pool) -> list[np.ndarray]:
        """By token budget; see `Encoder`."""
        return self._cut(pool).batches

    def encode(self, pool: Pool, positions: np.ndarray) -> Encoded:
        """Sentence embeddings; see `Encoder`."""
        cut = self._cut(pool)
        inputs = self._tokenize(self._texts(pool, positions))
        with torch.inference_mode():
            vectors = self._vectors(inputs)
        width = cut.width(positions)
        return Encoded(vectors, self._price(width) * len(positions), width * len(positions))

    def flops(self, pool: Pool) -> float:
        """By the length to which each batch is padded; see `Encoder`."""
        cut = self._cut(pool)
        return sum(self._price(cut.width(rows)) * len(rows) for rows in cut.batches)

    def _cut(self, pool: Pool) -> _Cut:
        if pool not in self._cuts:
            everything = np.arange(len(pool))
            chunks = (everything[start : start + TOKENIZED] for start in range(0, len(pool), TOKENIZED))
            masks = (self._tokenize(self._texts(pool, rows))["attention_mask"] for rows in chunks)
            length = np.concatenate([mask.sum(dim=1).numpy() for mask in masks])
            self._cuts[pool] = _Cut(length, budget_batches(length, pool.ids, self._tokens))
        return self._cuts[pool]

    def _texts(self, pool: Pool, positions: np.ndarray) -> list[str]:
        """The texts at `positions`: those of a whole pool may not fit in memory."""
        return self._task.texts(pool.subset(positions, pool.name))

    def _tokenize(self, texts: list[str]) -> dict[str, Any]:
        """Tensors by token, and what else the model wants to know, such as the length of the prompt."""
        made: dict[str, Any] = self._model.preprocess(texts, prompt=self._prompt)
        return made

    def _vectors(self, inputs: dict[str, Any]) -> Tensor:
        device = self._model.device
        made = self._model({name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
        vectors: Tensor = made["sentence_embedding"][:, : self._model.truncate_dim]
        return vectors

    def _check(self, name: str) -> None:
        inputs = self._tokenize(["word"])
        if any(getattr(inputs.get(key), "ndim", 0) != 2 for key in ("input_ids", "attention_mask")):
            raise ConfigError(
                f"encoder = {name!r} reads {sorted(inputs)}, and no rows of input_ids with an attention_mask, by which "
                "texts are batched and FLOPs counted: name a transformer"
            )

    def _price(self, length: int) -> float:
        """FLOPs of one text of `length` tokens."""
        return float(self._law @ [1, length, length**2])

    def _count(self) -> np.ndarray:
        """Coefficients of the cost of a text in its length: constant, linear, quadratic. Sets `dimension`."""
        inputs = self._tokenize(["word " * max(COUNTED_LENGTHS)])
        costs = []
        for length in COUNTED_LENGTHS:
            cut = {name: x[:, :length] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            with torch.no_grad():
                self.dimension = self._vectors(cut).shape[1]
                costs.append(count_flops(partial(self._vectors, cut)))
        return np.linalg.solve(np.vander(COUNTED_LENGTHS, increasing=True).astype(float), np.array(costs, dtype=float))


def load_encoder(name: str) -> Any:
    """A sentence-transformers model in evaluation mode, in float32; no code of the model's own is executed.

    Raises:
        ConfigError: if the extra is not installed, or the model is neither a folder nor to be had from the hub.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"encoder = {name!r} needs sentence-transformers: pip install 'cads-select[sentence-transformers]'"
        ) from error
    try:
        # By default the weights keep the type they are stored in.
        model = SentenceTransformer(name, trust_remote_code=False, model_kwargs={"dtype": torch.float32})
    except Interrupted:
        raise
    except Exception as error:
        # What a missing or damaged model raises depends on which of its files is read first.
        raise ConfigError(
            f"encoder = {name!r} cannot be loaded ({type(error).__name__}: {error}): name a folder, or a "
            "sentence-transformers model that the hub has"
        ) from error
    return model.eval()


def backbone_network(task: Task, name: str, size: int | None, *, pretrained: bool, download: bool) -> nn.Module:
    """A torchvision classifier for the images of `task`, scaled to `size` pixels square if that is given.

    The task normalises images by the moments of its pool; pretrained weights read them as they were trained to.

    Raises:
        ConfigError: if the task has no images. DataError: if pretrained weights are missing.
    """
    if not isinstance(task, VisionTask):
        raise ConfigError(f"backbone = {name!r} reads images, and {task.name} has none: name an encoder of its kind")
    channels, *sides = task.pool.batch(np.zeros(1, dtype=np.int64)).inputs["images"].shape[1:]
    height, width = sides if size is None else (size, size)
    network = Network(name, pretrained=pretrained, download=download).build((channels, height, width), N_UNUSED)
    before: list[nn.Module] = [] if size is None else [nn.Upsample(size=(size, size), mode="bilinear")]
    if pretrained:
        before.append(_AsTrained(task, name))
    return nn.Sequential(*before, network)


class _AsTrained(nn.Module):
    """Images normalised by the moments of a task, (B, C, H, W), as torchvision's weights of `name` read them."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: VisionTask, name: str) -> None:
        super().__init__()
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        moments = task.mean, task.std, weights.mean, weights.std
        mean, std, its_mean, its_std = (torch.tensor(x)[:, None, None] for x in moments)
        self.register_buffer("scale", std / 255 / its_std)
        self.register_buffer("shift", (mean / 255 - its_mean) / its_std)

    def forward(self, images: Tensor) -> Tensor:
        """In colour where the weights are."""
        return images * self.scale + self.shift
