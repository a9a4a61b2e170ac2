"""Token sequences as the payload of a pool: flat arrays with offsets, collated without a loop over examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
"""The label of a position that is not learned from (PyTorch's and transformers' convention)."""

PAD_TO = 2
"""Batches are padded to a multiple of this many positions, so that few shapes have to be counted."""

SEQUENCES_AT_ONCE = 2**11
"""Sequences that are counted, hashed or copied at once."""
TOKENS_AT_ONCE = 2**20
"""Tokens that are looked through at once, a multiple of 8."""


class Sequences(NamedTuple):
    """N token sequences, one after another.

    Attributes:
        ids: all token ids, int32, shape (total,).
        learned: which of them are answers, that are learned from, bool, shape (total,).
        offsets: where each sequence begins, and the end of the last, int64, shape (N + 1,).
        texts: what each example asks, as text.
    """

    ids: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    texts: pa.Array


class Sink(Protocol):
    """Where sequences go as they are made."""

    def add(self, shard: Sequences) -> None:
        """Take some more, at least one."""
        ...


class Collected:
    """A sink that holds sequences in memory."""

    def __init__(self) -> None:
        self._shards: list[Sequences] = []

    def add(self, shard: Sequences) -> None:
        """See `Sink`."""
        self._shards.append(shard)

    def sequences(self) -> Sequences:
        """All of them, in one piece."""
        sizes = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        return Sequences(
            ids=np.concatenate([shard.ids for shard in self._shards]),
            learned=np.concatenate([shard.learned for shard in self._shards]),
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            texts=pa.concat_arrays([shard.texts for shard in self._shards]),
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """N token sequences as a payload.

    The arrays may be memory-mapped: they are read, never written, and nowhere copied whole.

    Attributes:
        ids, learned, offsets, texts: see `Sequences`.
        subtasks: the subtask of each, int, shape (N,), or None.
        pad: the token id that batches are filled up with; it is masked.
        longest: positions that no batch exceeds: the context of the model, or less.
        packed: whether the examples of a batch share rows; see `pack`.
    """

    ids: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    texts: pa.Array
    subtasks: np.ndarray | None = None
    pad: int = 0
    longest: int = 2**31
    packed: bool = False

    def __post_init__(self) -> None:
        sizes = np.diff(self.offsets)
        if len(self.ids) != len(self.learned) or self.offsets[-1] != len(self.ids):
            raise DataError(
                f"{len(self.ids)} token ids, {len(self.learned)} marks of answers and a last offset of "
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
        """Collate sequences, filled up at their ends to T, a multiple of `PAD_TO`.

        Inputs: `input_ids` and `attention_mask` (B, T); `answers` (B, A), the places of the tokens that are learned
        from, filled up with 0; `weight` (B,), the answer tokens of an example over their mean in the batch. Packed
        batches have `row` and `offset` (B,) too: where each sequence goes. Labels (B, T): the answer tokens, and
        `IGNORED` elsewhere.
        """
        positions = np.asarray(positions, dtype=np.int64)
        starts = self.offsets[positions]
        sizes = self.offsets[positions + 1] - starts
        columns = np.arange(self._width(sizes.max()))
        present = columns < sizes[:, None]
        places = np.where(present, starts[:, None] + columns, 0)
        ids = np.where(present, self.ids[places], self.pad).astype(np.int64)
        learned = present & self.learned[places] & (columns > 0)
        counts = self.answers[positions]
        inputs = {
            "input_ids": ids,
            "attention_mask": present.astype(np.int64),
            "answers": _answer_places(learned, counts),
            "weight": (counts / max(1.0, counts.mean())).astype(np.float32),
        }
        tokens = ids.size
        if self.packed:
            inputs["row"], inputs["offset"] = row, offset = layout(sizes, self.longest)
            tokens = (int(row[-1]) + 1) * self._width((offset + sizes).max())
        return Batch(
            inputs={name: torch.from_numpy(x) for name, x in inputs.items()},
            labels=torch.from_numpy(np.where(learned, ids, IGNORED)),
            positions=torch.from_numpy(positions),
            tokens=tokens,
            answer_tokens=int(counts.sum()),
        )

    def take(self, positions: np.ndarray) -> Tokens:
        """The sequences at `positions` (repeats allowed), copied."""
        positions = np.asarray(positions, dtype=np.int64)
        starts = self.offsets[positions]
        sizes = self.offsets[positions + 1] - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids, learned = np.empty(offsets[-1], dtype=np.int32), np.empty(offsets[-1], dtype=bool)
        for piece in _pieces(len(positions)):
            begin, end = offsets[piece.start], offsets[piece.stop]
            places = np.arange(begin, end) + np.repeat(starts[piece] - offsets[:-1][piece], sizes[piece])
            ids[begin:end], learned[begin:end] = self.ids[places], self.learned[places]
        return replace(
            self,
            ids=ids,
            learned=learned,
            offsets=offsets,
            texts=self.texts.take(pa.array(positions)),
            subtasks=None if self.subtasks is None else self.subtasks[positions],
        )

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Examples cost the same that are padded to the same T and A."""
        widths, answers = self._widths(self.lengths()), self._widths(self.answers)
        _, representatives, codes = np.unique(
            widths * (answers.max(initial=0) + 1) + answers, return_index=True, return_inverse=True
        )
        return representatives, codes.reshape(-1)

    def digests(self) -> pa.Array:
        """A hash of each sequence's tokens, large binary, shape (N,); which of them are learned does not count."""
        return self._digests

    def label_digest(self) -> bytes:
        """A hash of which tokens are learned."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self.learned), TOKENS_AT_ONCE):
            digest.update(np.packbits(self.learned[start : start + TOKENS_AT_ONCE]).data)
        return digest.digest()

    @cached_property
    def answers(self) -> np.ndarray:
        """Answer tokens of each sequence that can be predicted (the first of a sequence cannot), int64, shape (N,)."""
        counts = np.empty(len(self), dtype=np.int64)
        for piece in _pieces(len(self)):
            starts = self.offsets[piece]
            begin, end = starts[0], self.offsets[piece.stop]
            learned = np.asarray(self.learned[begin:end])
            first = learned[starts - begin]
            counts[piece] = np.add.reduceat(learned, starts - begin, dtype=np.int64) - first
        return counts

    @cached_property
    def last_answers(self) -> frozenset[int]:
        """The token ids that stand at the end of an answer, somewhere."""
        found: set[int] = set()
        total = len(self.learned)
        for start in range(0, total, TOKENS_AT_ONCE):
            learned = np.asarray(self.learned[start : start + TOKENS_AT_ONCE + 1])
            if len(learned) <= TOKENS_AT_ONCE:
                learned = np.append(learned, False)
            last = start + np.flatnonzero(learned[:-1] & ~learned[1:])
            found.update(np.unique(self.ids[last]).tolist())
        return frozenset(found)

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
        return np.minimum(-(-np.maximum(sizes, 1) // PAD_TO) * PAD_TO, self.longest)


def _pieces(count: int) -> Iterator[slice]:
    """`count` sequences, `SEQUENCES_AT_ONCE` at a time."""
    for start in range(0, count, SEQUENCES_AT_ONCE):
        yield slice(start, min(start + SEQUENCES_AT_ONCE, count))


def _answer_places(learned: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Columns where `learned` (B, T) holds, row by row, filled up with 0 to a multiple of `PAD_TO`; int64, (B, A)."""
    width = min(-(-max(1, int(counts.max())) // PAD_TO) * PAD_TO, learned.shape[1])
    rows, columns = np.nonzero(learned)
    places = np.zeros((len(learned), width), dtype=np.int64)
    places[rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
    return places


def layout(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill rows of `capacity` positions with sequences, in order, each whole in one row.

    Args:
        sizes: of the sequences, none above `capacity`, shape (B,).

    Returns:
        the row of each sequence, and where it begins in it; int64, shape (B,) each.
    """
    ends = np.cumsum(sizes)
    breaks = [0]
    while True:
        begin = ends[breaks[-1] - 1] if breaks[-1] else 0
        after = int(np.searchsorted(ends, begin + capacity, side="right"))
        if after >= len(sizes):
            break
        breaks.append(after)
    starts = ends - sizes
    row = np.searchsorted(np.array(breaks), np.arange(len(sizes)), side="right") - 1
    return row.astype(np.int64), starts - starts[np.array(breaks)][row]


@dataclass(frozen=True)
class Packed:
    """A batch whose sequences share R rows of L positions.

    Attributes:
        inputs: `input_ids` and `position_ids` (R, L), the latter beginning anew with each sequence;
            `attention_mask` (R, 1, L, L), 0 where a position may look and the lowest number elsewhere.
        places: where the answers of each example are predicted, in the R * L positions, shape (B, A).
    """

    inputs: dict[str, Tensor]
    places: Tensor


def pack(inputs: dict[str, Tensor], dtype: torch.dtype) -> Packed:
    """Lay out a batch of `Tokens` by its `row` and `offset`; no position sees another sequence.

    Args:
        inputs: of the batch. dtype: of the mask.
    """
    ids, present = inputs["input_ids"], inputs["attention_mask"].bool()
    row, offset = inputs["row"] - inputs["row"].min(), inputs["offset"]
    ends = offset + present.sum(dim=1)
    length = -(-int(ends.max()) // PAD_TO) * PAD_TO
    shape = int(row.max()) + 1, length
    steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    places = (row * length + offset)[:, None] + steps
    packed_ids, position_ids = ids.new_zeros(shape[0] * length), ids.new_zeros(shape[0] * length)
    # Fillers are sequence 0, which none of the others sees; each of them looks at the fillers before it.
    owner = ids.new_zeros(shape[0] * length)
    packed_ids[places[present]] = ids[present]
    position_ids[places[present]] = steps[present]
    numbers = torch.arange(1, len(ids) + 1, device=ids.device)[:, None].expand_as(ids)
    owner[places[present]] = numbers[present]
    owner = owner.view(shape)
    sees = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill(~sees, torch.finfo(dtype).min)
    predicted = (row * length + offset)[:, None] + (inputs["answers"] - 1).clamp(min=0)
    return Packed(
        {
            "input_ids": packed_ids.view(shape),
            "position_ids": position_ids.view(shape),
            "attention_mask": mask[:, None],
        },
        predicted,
    )
