"""From rows of text to tokens: which of them are learned, what is cut, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cads.errors import DataError
from cads.tasks.language.formats import UNANSWERED, Example, Renderer, UnansweredError
from cads.tasks.language.rows import Rows
from cads.tasks.language.tokens import Collected, Sequences, Sink, Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows of one source when they were encoded.

    Attributes:
        rows: how many there were.
        cut: how many of those that were kept were cut.
        left_out: positions of those without an answer token, ascending, int64.
        left_out_cut: how many of these were cut.
    """

    rows: int
    cut: int
    left_out: np.ndarray
    left_out_cut: int

    def __len__(self) -> int:
        return self.rows - len(self.left_out)

    @property
    def counts(self) -> dict[str, int]:
        """All but the positions, as JSON values."""
        return {
            "rows": self.rows,
            "cut": self.cut,
            "left_out": len(self.left_out),
            "left_out_cut": self.left_out_cut,
        }

    @property
    def positions(self) -> np.ndarray:
        """Of the rows that were kept, ascending, int64."""
        return np.delete(np.arange(self.rows), self.left_out)


@dataclass(frozen=True)
class Encoder:
    """Turns rows into tokens.

    Attributes:
        tokenizer: a fast tokenizer. renderer: of its chats.
        longest: tokens at which an example is cut. packed: see `Tokens`.
        drop: leave out examples without an answer token, instead of refusing them.
    """

    tokenizer: Any
    renderer: Renderer
    longest: int
    packed: bool = False
    drop: bool = False

    def encode(self, rows: Rows) -> tuple[Tokens, np.ndarray]:
        """The tokens of `rows` in memory, and the positions in it of those that were kept.

        Raises: as `encode_into`.
        """
        collected = Collected()
        kept = self.encode_into(rows, collected)
        return self.tokens(collected.sequences()), kept.positions

    def encode_into(self, rows: Rows, sink: Sink) -> EncodingReport:
        """Give the tokens of `rows` to `sink`, `ROWS_AT_ONCE` rows at a time; what was cut or left out is said.

        Raises:
            DataError: naming examples that have no answer, or no token of it, in the text or after it was cut.
        """
        render, chat = self.renderer.of(rows.format), self.renderer.is_chat(rows.format)
        cut: list[np.ndarray] = []
        answered: list[np.ndarray] = []
        for ids, table in rows.shards():
            records = zip(table.to_pylist(), ids.to_pylist(), strict=True)
            examples = [self._render(render, row, name) for row, name in records]
            encoded = self._tokenize(examples, chat=chat)
            cut.append(np.array([len(tokens) > self.longest for tokens, _ in encoded]))
            encoded = [(tokens[: self.longest], marks[: self.longest]) for tokens, marks in encoded]
            answered.append(np.array([bool(marks[1:].any()) for _, marks in encoded]))
            chosen = np.flatnonzero(answered[-1]).tolist()
            if chosen:
                sink.add(_shard([encoded[k] for k in chosen], [examples[k].asked for k in chosen]))
        was_cut, has_answer = np.concatenate(cut), np.concatenate(answered)
        left_out = np.flatnonzero(~has_answer)
        kept = EncodingReport(len(rows), int((was_cut & has_answer).sum()), left_out, int(was_cut[left_out].sum()))
        self.say(rows, kept)
        return kept

    def tokens(self, sequences: Sequences, subtasks: np.ndarray | None = None) -> Tokens:
        """Sequences as a payload; see `Tokens`."""
        return Tokens(
            *sequences, subtasks=subtasks, pad=self.tokenizer.pad_token_id, longest=self.longest, packed=self.packed
        )

    def say(self, rows: Rows, kept: EncodingReport) -> None:
        """Say what was cut and left out.

        Raises:
            DataError: if nothing may be left out, or nothing is left.
        """
        if len(kept.left_out):
            what = (
                f"{len(kept.left_out)} examples of {rows.name} have no answer token ({kept.left_out_cut} of them after "
                f"they were cut to {self.longest} tokens), such as "
                f"{rows.ids.take(pa.array(kept.left_out[:3])).to_pylist()}"
            )
            if not self.drop:
                raise DataError(f"{what}: raise max_tokens, remove them, or set drop: true to leave them out")
            if not len(kept):
                raise DataError(f"{what}: nothing is left of {rows.name}")
            log.warning("%s: they are left out", what)
        if kept.cut:
            log.warning(
                "%s: %d of %d examples were cut to %d tokens (max_tokens)", rows.name, kept.cut, len(kept), self.longest
            )

    def _render(
        self, render: Callable[[Mapping[str, Any], str], Example], row: Mapping[str, Any], name: str
    ) -> Example:
        """An example, or `UNANSWERED` if it has no answer and may be left out."""
        try:
            return render(row, name)
        except UnansweredError:
            if not self.drop:
                raise
            return UNANSWERED

    def _tokenize(self, examples: list[Example], *, chat: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        if chat and self.renderer.marked:
            return [(np.array(ids, np.int32), marks) for ids, marks in (e.encoded for e in examples if e.encoded)]
        # A chat template writes the special tokens itself.
        found = self.tokenizer(
            [e.text for e in examples],
            add_special_tokens=not chat,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        encoded = []
        end = self.tokenizer.eos_token_id
        for example, ids, where in zip(examples, found["input_ids"], found["offset_mapping"], strict=True):
            tokens, spans = np.array(ids, dtype=np.int32), np.array(where, dtype=np.int64).reshape(-1, 2)
            marks = np.zeros(len(tokens), dtype=bool)
            for begin, until in example.answers:
                marks |= (spans[:, 0] >= begin) & (spans[:, 1] <= until) & (spans[:, 1] > spans[:, 0])
            if not chat and end is not None and (not len(tokens) or tokens[-1] != end):
                tokens, marks = np.append(tokens, np.int32(end)), np.append(marks, bool(example.answers))
            encoded.append((tokens, marks))
        return encoded


def _shard(encoded: list[tuple[np.ndarray, np.ndarray]], asked: list[str]) -> Sequences:
    return Sequences(
        ids=np.concatenate([tokens for tokens, _ in encoded]),
        learned=np.concatenate([marks for _, marks in encoded]),
        offsets=np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in encoded])]).astype(np.int64),
        texts=pa.array(asked, pa.large_string()),
    )
