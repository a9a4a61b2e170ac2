"""Token sequences as the payload of a pool: flat arrays with offsets, collated without a loop over examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cads.data.batch import Batch
from cads.data.hashing import digests
from cads.data.pool import Pool
from cads.errors import DataError


def tokens_of(pool: Pool) -> Tokens:
    """The payload of a pool of token sequences.

    Raises:
        DataError: if it holds something else.
    """
    if not isinstance(pool.examples, Tokens):
        raise DataError(f"the {pool.name} holds {type(pool.examples).__name__}: a language task needs Tokens")
    return pool.examples


IGNORED = -100
"""The label of a position without a loss (the convention of PyTorch and transformers)."""

PAD_TO = 2
"""Batches are padded to a multiple of this many positions, so that few shapes have to be counted."""

SEQUENCES_AT_ONCE = 2**11
"""Sequences that are counted, hashed or copied at a time."""
TOKENS_AT_ONCE = 2**20
"""Tokens of the loss mask that are scanned at a time, a multiple of 8."""


class Sequences(NamedTuple):
    """N token sequences, one after another.

    Attributes:
        ids: all token ids, int32, shape (total,).
        loss_mask: whether a token belongs to an answer and counts in the loss, bool, shape (total,).
        offsets: start of each sequence in `ids`, and the end of the last, int64, shape (N + 1,).
        texts: the prompt of each example, as text.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    texts: pa.Array


class Sink(Protocol):
    """Takes sequences as they are encoded."""

    def add(self, shard: Sequences) -> None:
        """Take the next sequences, at least one."""
        ...


class Collected:
    """A sink that holds sequences in memory."""

    def __init__(self) -> None:
        self._shards: list[Sequences] = []

    def add(self, shard: Sequences) -> None:
        """See `Sink`."""
        self._shards.append(shard)

    def sequences(self) -> Sequences:
        """All sequences in one piece."""
        sizes = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        return Sequences(
            ids=np.concatenate([shard.ids for shard in self._shards]),
            loss_mask=np.concatenate([shard.loss_mask for shard in self._shards]),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            texts=pa.concat_arrays([shard.texts for shard in self._shards]),
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """N token sequences as a payload.

    The arrays may be memory-mapped: they are only read, and no array is copied whole.

    Attributes:
        ids, loss_mask, offsets, texts: see `Sequences`.
        subtasks: the subtask of each sequence, int, shape (N,), or None.
        pad: the token id of padding; it is masked.
        max_length: most positions of a row of a batch: the context of the model, or less.
        packed: whether the examples of a batch share rows; see `pack`.
        joint: whether the examples of pool and target in a step are one batch, padded together.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    texts: pa.Array
    subtasks: np.ndarray | None = None
    pad: int = 0
    max_length: int = 2**31
    packed: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        sizes = np.diff(self.offsets)
        if len(self.ids) != len(self.loss_mask) or self.offsets[-1] != len(self.ids):
            raise DataError(
                f"{len(self.ids)} token ids, {len(self.loss_mask)} entries of the loss mask and a last offset of "
                f"{self.offsets[-1]}: they must agree"
            )
        if (sizes < 1).any():
            raise DataError(f"{int((sizes < 1).sum())} examples have no token: remove them")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64, shape (N,)."""
        return np.diff(self.offsets)

    def batch(self, positions: np.ndarray) -> Batch:
        """Collate sequences, padded at their ends to T, a multiple of `PAD_TO`.

        Inputs: `input_ids` and `attention_mask` (B, T); `answers` (B, A), the columns of the answer tokens, padded
        with 0; `weight` (B,), the number of answer tokens of an example over the mean number in the batch. Packed
        batches also have `row` and `offset` (B,): the row of each sequence, and its start in that row. Labels (B, T):
        the answer tokens, and `IGNORED` elsewhere.
        """
        positions = np.asarray(positions, dtype=np.int64)
        starts = self.offsets[positions]
        sizes = self.offsets[positions + 1] - starts
        columns = np.arange(self._width(sizes.max()))
        present = columns < sizes[:, None]
        indices = np.where(present, starts[:, None] + columns, 0)
        ids = np.where(present, self.ids[indices], self.pad).astype(np.int64)
        loss_mask = present & self.loss_mask[indices] & (columns > 0)
        counts = self.answers[positions]
        inputs = {
            "input_ids": ids,
            "attention_mask": present.astype(np.int64),
            "answers": _answer_columns(loss_mask, counts),
            "weight": (counts / max(1.0, counts.mean())).astype(np.float32),
        }
        tokens = ids.size
        if self.packed:
            inputs["row"], inputs["offset"] = row, offset = layout(sizes, self.max_length)
            tokens = (int(row[-1]) + 1) * self._width((offset + sizes).max())
        return Batch(
            inputs={name: torch.from_numpy(x) for name, x in inputs.items()},
            labels=torch.from_numpy(np.where(loss_mask, ids, IGNORED)),
            positions=torch.from_numpy(positions),
            tokens=tokens,
            answer_tokens=int(counts.sum()),
        )

    def batch_with(self, positions: np.ndarray, other: Tokens, other_positions: np.ndarray) -> Batch | None:
        """These sequences, then some of `other`, in one batch; None if they are not batched together."""
        if not self.joint:
            return None
        batch = concatenated([self.take(positions), other.take(other_positions)]).batch(
            np.arange(len(positions) + len(other_positions))
        )
        return replace(batch, positions=torch.from_numpy(np.concatenate([positions, other_positions])))

    def take(self, positions: np.ndarray) -> Tokens:
        """The sequences at `positions` (repeats allowed), copied."""
        positions = np.asarray(positions, dtype=np.int64)
        starts = self.offsets[positions]
        sizes = self.offsets[positions + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids, loss_mask = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=bool)
        for piece in _pieces(len(positions)):
            begin, end = offsets[piece.start], offsets[piece.stop]
            indices = np.arange(begin, end) + np.repeat(starts[piece] - offsets[:-1][piece], sizes[piece])
            ids[begin:end], loss_mask[begin:end] = self.ids[indices], self.loss_mask[indices]
        return replace(
            self,
            ids=ids,
            loss_mask=loss_mask,
            offsets=offsets,
            texts=self.texts.take(pa.array(positions)),
            subtasks=None if self.subtasks is None else self.subtasks[positions],
        )

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Examples that are padded to the same T and the same A cost the same."""
        widths, answers = self._widths(self.lengths()), self._widths(self.answers)
        _, representatives, codes = np.unique(
            widths * (answers.max(initial=0) + 1) + answers, return_index=True, return_inverse=True
        )
        return representatives, codes.reshape(-1)

    def digests(self) -> pa.Array:
        """A hash of each sequence's tokens, large binary, shape (N,); the loss mask does not count."""
        return self._digests

    def label_digest(self) -> bytes:
        """A hash of the loss mask."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self.loss_mask), TOKENS_AT_ONCE):
            digest.update(np.packbits(self.loss_mask[start : start + TOKENS_AT_ONCE]).data)
        return digest.digest()

    @cached_property
    def answers(self) -> np.ndarray:
        """Answer tokens of each sequence that can be predicted (the first of a sequence cannot), int64, shape (N,)."""
        counts = np.empty(len(self), dtype=np.int64)
        for piece in _pieces(len(self)):
            starts = self.offsets[piece]
            begin, end = starts[0], self.offsets[piece.stop]
            loss_mask = np.asarray(self.loss_mask[begin:end])
            first = loss_mask[starts - begin]
            counts[piece] = np.add.reduceat(loss_mask, starts - begin, dtype=np.int64) - first
        return counts

    @cached_property
    def last_answers(self) -> frozenset[int]:
        """The token ids that end at least one answer."""
        token_ids: set[int] = set()
        total = len(self.loss_mask)
        for start in range(0, total, TOKENS_AT_ONCE):
            loss_mask = np.asarray(self.loss_mask[start : start + TOKENS_AT_ONCE + 1])
            if len(loss_mask) <= TOKENS_AT_ONCE:
                loss_mask = np.append(loss_mask, False)
            last_positions = start + np.flatnonzero(loss_mask[:-1] & ~loss_mask[1:])
            token_ids.update(np.unique(self.ids[last_positions]).tolist())
        return frozenset(token_ids)

    @cached_property
    def _digests(self) -> pa.Array:
        return digests(self._each())

    def _each(self) -> Iterator[np.ndarray]:
        """The token ids of each sequence."""
        content = np.ascontiguousarray(self.ids, dtype=np.int32)
        for piece in _pieces(len(self)):
            for start, end in pairwise(self.offsets[piece.start : piece.stop + 1].tolist()):
                yield content[start:end]

    def _width(self, size: int) -> int:
        return int(self._widths(np.array([size]))[0])

    def _widths(self, sizes: np.ndarray) -> np.ndarray:
        return np.minimum(-(-np.maximum(sizes, 1) // PAD_TO) * PAD_TO, self.max_length)


def concatenated(parts: Sequence[Tokens]) -> Tokens:
    """Sequences one after another, padded as those of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first
    sizes = np.concatenate([part.lengths() for part in parts])
    return replace(
        first,
        ids=np.concatenate([part.ids for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        texts=pa.chunked_array([part.texts for part in parts]).combine_chunks(),
        subtasks=None,
    )


def _pieces(count: int) -> Iterator[slice]:
    """Slices that cover `count` sequences, `SEQUENCES_AT_ONCE` at a time."""
    for start in range(0, count, SEQUENCES_AT_ONCE):
        yield slice(start, min(start + SEQUENCES_AT_ONCE, count))


def _answer_columns(loss_mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Columns where `loss_mask` (B, T) is true, row by row, padded with 0 to a multiple of `PAD_TO`; int64, (B, A)."""
    width = min(-(-max(1, int(counts.max())) // PAD_TO) * PAD_TO, loss_mask.shape[1])
    rows, columns = np.nonzero(loss_mask)
    answer_columns = np.zeros((len(loss_mask), width), dtype=np.int64)
    answer_columns[rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
    return answer_columns


def layout(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows of `capacity` positions with sequences in order; no sequence is split between rows.

    Args:
        sizes: tokens of each sequence, none above `capacity`, shape (B,).

    Returns:
        the row of each sequence, and its start in that row; int64, shape (B,) each.
    """
    ends = np.cumsum(sizes)
    breaks = [0]
    while True:
        begin = ends[breaks[-1] - 1] if breaks[-1] else 0
        next_break = int(np.searchsorted(ends, begin + capacity, side="right"))
        if next_break >= len(sizes):
            break
        breaks.append(next_break)
    starts = ends - sizes
    row = np.searchsorted(np.array(breaks), np.arange(len(sizes)), side="right") - 1
    return row.astype(np.int64), starts - starts[np.array(breaks)][row]


@dataclass(frozen=True)
class Packed:
    """A batch whose sequences share R rows of L positions.

    Attributes:
        inputs: `input_ids` and `position_ids` (R, L), the latter counted from 0 in each sequence;
            `attention_mask` (R, 1, L, L), 0 where a position attends and the lowest number elsewhere.
        answer_positions: positions, among the R * L, that predict the answers of each example, shape (B, A).
    """

    inputs: dict[str, Tensor]
    answer_positions: Tensor


def pack(inputs: dict[str, Tensor], dtype: torch.dtype) -> Packed:
    """Lay out a batch of `Tokens` by its `row` and `offset`; no position attends to another sequence.

    Args:
        inputs: of the batch. dtype: of the attention mask.
    """
    ids, present = inputs["input_ids"], inputs["attention_mask"].bool()
    row, offset = inputs["row"] - inputs["row"].min(), inputs["offset"]
    ends = offset + present.sum(dim=1)
    length = -(-int(ends.max()) // PAD_TO) * PAD_TO
    shape = int(row.max()) + 1, length
    steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    flat_positions = (row * length + offset)[:, None] + steps
    packed_ids, position_ids = ids.new_zeros(shape[0] * length), ids.new_zeros(shape[0] * length)
    # Padding is numbered as sequence 0: no sequence attends to it, and it attends to the padding before it.
    owner = ids.new_zeros(shape[0] * length)
    packed_ids[flat_positions[present]] = ids[present]
    position_ids[flat_positions[present]] = steps[present]
    sequence_numbers = torch.arange(1, len(ids) + 1, device=ids.device)[:, None].expand_as(ids)
    owner[flat_positions[present]] = sequence_numbers[present]
    owner = owner.view(shape)
    visible = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(~visible, torch.finfo(dtype).min)
    answer_positions = (row * length + offset)[:, None] + (inputs["answers"] - 1).clamp(min=0)
    return Packed(
        {
            "input_ids": packed_ids.view(shape),
            "position_ids": position_ids.view(shape),
            "attention_mask": mask[:, None],
        },
        answer_positions,
    )
