"""Encoders of examples: a task's own features, a torchvision backbone's, or a sentence encoder's.

Each encodes a pool batch by batch, so that only the vectors that the caller stores are in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

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

TOKENIZED_TEXTS = 1024
"""Texts whose tokens are in memory at once while their lengths are determined."""
ENCODING, COMPARING = "embeddings", "similarities"
"""What the ledger calls the passes of an encoder, and the comparison of its vectors."""
N_UNUSED = 2
"""Number of classes of a backbone; its class scores are never used."""
COUNTED_LENGTHS = (8, 16, 32)
"""Lengths at which FLOPs are counted. Attention makes them quadratic in the length: three lengths determine them."""


@dataclass(frozen=True)
class EncodedBatch:
    """Vectors of some examples of a pool.

    Attributes:
        vectors: shape (B, D). flops: cost of encoding. tokens: number in the batch, padding included.
    """

    vectors: Tensor
    flops: float
    tokens: int


@dataclass(frozen=True)
class _Batching:
    """The number of tokens of each text of a pool (shape (N,)), and the batches in which texts are encoded."""

    length: np.ndarray
    batches: list[np.ndarray]

    def width(self, positions: np.ndarray) -> int:
        """Number of tokens to which a batch is padded."""
        return int(self.length[positions].max())


class Encoder(ABC):
    """A map from examples to vectors.

    Attributes:
        dimension: D, the length of a vector.
    """

    dimension: int

    @abstractmethod
    def batches(self, pool: Pool) -> list[np.ndarray]:
        """All positions of `pool`, grouped into the batches that are encoded together."""

    @abstractmethod
    def encode(self, pool: Pool, positions: np.ndarray) -> EncodedBatch:
        """The vectors of one batch, without gradients."""

    @abstractmethod
    def flops(self, pool: Pool) -> float:
        """FLOPs of encoding all of `pool`."""


class FeatureEncoder(Encoder):
    """The inputs of a model's last layer, by `Task.features`.

    Args:
        task: computes the features.
        counted: a model of the same shapes on which FLOPs are counted, on the CPU or on the meta device.
        tokens: padded tokens of a batch.

    Attributes:
        model: computes the vectors; has to be set before the first `encode`.

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

    def encode(self, pool: Pool, positions: np.ndarray) -> EncodedBatch:
        """Features in evaluation mode; see `Encoder`."""
        assert self.model is not None
        batch = pool.batch(positions)
        flops = self._price(batch)
        with torch.inference_mode():
            vectors = self._task.features(self.model.eval(), batch.to(device_of(self.model)))
        return EncodedBatch(vectors, flops, batch.tokens)

    def flops(self, pool: Pool) -> float:
        """Counted once per shape; see `Encoder`."""
        return planned_flops(self._price, pool, tokens=self._tokens)


class SentenceEncoder(Encoder):
    """A sentence-transformers model, run on length-sorted batches by token budget.

    Vectors equal those of the model's `encode`: with its default prompt, and truncated to its `truncate_dim` if it has
    one.

    Args:
        task: has the texts that are encoded.
        name: the model's name on the hub, or its folder.
        tokens: padded tokens of a batch.

    Raises:
        ConfigError: if the task has no texts, sentence-transformers is not installed, or the model cannot be loaded or
            reads no sequences of tokens.
    """

    def __init__(self, task: Task, name: str, tokens: int) -> None:
        task.texts(task.target)  # A task without texts raises before the encoder is loaded.
        self._task, self._tokens = task, tokens
        self._model = load_encoder(name)
        self._prompt = self._model.prompts.get(self._model.default_prompt_name)
        self._check(name)
        self._flops_coefficients = self._count_flops()
        self._batchings: WeakKeyDictionary[Pool, _Batching] = WeakKeyDictionary()

    def batches(self, pool: Pool) -> list[np.ndarray]:
        """By token budget; see `Encoder`."""
        return self._batching(pool).batches

    def encode(self, pool: Pool, positions: np.ndarray) -> EncodedBatch:
        """Sentence embeddings; see `Encoder`."""
        batching = self._batching(pool)
        inputs = self._tokenize(self._texts(pool, positions))
        with torch.inference_mode():
            vectors = self._vectors(inputs)
        width = batching.width(positions)
        return EncodedBatch(vectors, self._text_flops(width) * len(positions), width * len(positions))

    def flops(self, pool: Pool) -> float:
        """From the length to which each batch is padded; see `Encoder`."""
        batching = self._batching(pool)
        return sum(self._text_flops(batching.width(rows)) * len(rows) for rows in batching.batches)

    def _batching(self, pool: Pool) -> _Batching:
        if pool not in self._batchings:
            positions = np.arange(len(pool))
            chunks = (positions[start : start + TOKENIZED_TEXTS] for start in range(0, len(pool), TOKENIZED_TEXTS))
            masks = (self._tokenize(self._texts(pool, rows))["attention_mask"] for rows in chunks)
            length = np.concatenate([mask.sum(dim=1).numpy() for mask in masks])
            self._batchings[pool] = _Batching(length, budget_batches(length, pool.ids, self._tokens))
        return self._batchings[pool]

    def _texts(self, pool: Pool, positions: np.ndarray) -> list[str]:
        """The texts at `positions` only: the texts of a whole pool may not fit in memory."""
        return self._task.texts(pool.subset(positions, pool.name))

    def _tokenize(self, texts: list[str]) -> dict[str, Any]:
        """Token tensors, and the model's other inputs, such as the length of the prompt."""
        inputs: dict[str, Any] = self._model.preprocess(texts, prompt=self._prompt)
        return inputs

    def _vectors(self, inputs: dict[str, Any]) -> Tensor:
        device = self._model.device
        outputs = self._model({name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
        vectors: Tensor = outputs["sentence_embedding"][:, : self._model.truncate_dim]
        return vectors

    def _check(self, name: str) -> None:
        inputs = self._tokenize(["word"])
        if any(getattr(inputs.get(key), "ndim", 0) != 2 for key in ("input_ids", "attention_mask")):
            raise ConfigError(
                f"encoder = {name!r} reads {sorted(inputs)}, and no rows of input_ids with an attention_mask, by which "
                "texts are batched and FLOPs counted: name a transformer"
            )

    def _text_flops(self, length: int) -> float:
        """FLOPs of one text of `length` tokens."""
        return float(self._flops_coefficients @ [1, length, length**2])

    def _count_flops(self) -> np.ndarray:
        """Coefficients of a text's FLOPs in its length: constant, linear, quadratic. Sets `dimension`."""
        inputs = self._tokenize(["word " * max(COUNTED_LENGTHS)])
        costs = []
        for length in COUNTED_LENGTHS:
            truncated = {name: x[:, :length] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            with torch.no_grad():
                self.dimension = self._vectors(truncated).shape[1]
                costs.append(count_flops(partial(self._vectors, truncated)))
        return np.linalg.solve(np.vander(COUNTED_LENGTHS, increasing=True).astype(float), np.array(costs, dtype=float))


def load_encoder(name: str) -> Any:
    """A sentence-transformers model in evaluation mode, in float32; no code from the model's repository is executed.

    Raises:
        ConfigError: if the extra is not installed, or the model is neither a folder nor available from the hub.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"encoder = {name!r} needs sentence-transformers: pip install 'cads-select[embeddings]'"
        ) from error
    try:
        # Without `dtype` the weights would keep the type they are stored in.
        model = SentenceTransformer(name, trust_remote_code=False, model_kwargs={"dtype": torch.float32})
    except Interrupted:
        raise
    except Exception as error:
        # The type of error that a missing or damaged model raises depends on which of its files is read first.
        raise ConfigError(
            f"encoder = {name!r} cannot be loaded ({type(error).__name__}: {error}): name a folder, or a "
            "sentence-transformers model that the hub has"
        ) from error
    return model.eval()


def backbone_network(task: Task, name: str, size: int | None, *, pretrained: bool, download: bool) -> nn.Module:
    """A torchvision classifier for the images of `task`, scaled to `size` pixels square if `size` is given.

    The task normalises images by the moments of its pool. For pretrained weights they are renormalised by the moments
    that the weights were trained with.

    Raises:
        ConfigError: if the task has no images. DataError: if pretrained weights are missing.
    """
    if not isinstance(task, VisionTask):
        raise ConfigError(f"backbone = {name!r} reads images, and {task.name} has none: name an encoder of its kind")
    channels, *image_size = task.pool.batch(np.zeros(1, dtype=np.int64)).inputs["images"].shape[1:]
    height, width = image_size if size is None else (size, size)
    network = Network(name, pretrained=pretrained, download=download).build((channels, height, width), N_UNUSED)
    preprocessing: list[nn.Module] = [] if size is None else [nn.Upsample(size=(size, size), mode="bilinear")]
    if pretrained:
        preprocessing.append(_Renormalise(task, name))
    return nn.Sequential(*preprocessing, network)


class _Renormalise(nn.Module):
    """Maps images normalised by a task's moments, (B, C, H, W), to the normalisation of torchvision's weights."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: VisionTask, name: str) -> None:
        super().__init__()
        import torchvision

        weights = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        moments = task.mean, task.std, weights.mean, weights.std
        mean, std, weights_mean, weights_std = (torch.tensor(x)[:, None, None] for x in moments)
        self.register_buffer("scale", std / 255 / weights_std)
        self.register_buffer("shift", (mean / 255 - weights_mean) / weights_std)

    def forward(self, images: Tensor) -> Tensor:
        """Grey images become colour images by broadcasting if the weights expect three channels."""
        return images * self.scale + self.shift
