"""From rows of text to tokens: loss masks, examples that are cut, and examples that are left out."""

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
    """How many rows of one source were cut and left out when they were encoded.

    Attributes:
        rows: number of rows.
        cut: number of encoded rows that were cut.
        left_out: positions of the rows without an answer token, ascending, int64.
        left_out_cut: number of rows in `left_out` that were cut.
    """

    rows: int
    cut: int
    left_out: np.ndarray
    left_out_cut: int

    def __len__(self) -> int:
        return self.rows - len(self.left_out)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of rows, as JSON values."""
        return {
            "rows": self.rows,
            "cut": self.cut,
            "left_out": len(self.left_out),
            "left_out_cut": self.left_out_cut,
        }

    @property
    def positions(self) -> np.ndarray:
        """Positions of the rows that were encoded, ascending, int64."""
        return np.delete(np.arange(self.rows), self.left_out)


@dataclass(frozen=True)
class TokenEncoder:
    """Turns rows into tokens.

    Attributes:
        tokenizer: a fast tokenizer. renderer: writes rows as text for this tokenizer.
        max_length: tokens at which an example is cut. packed: see `Tokens`.
        drop_unanswered: leave out examples without an answer token, instead of refusing them.
    """

    tokenizer: Any
    renderer: Renderer
    max_length: int
    packed: bool = False
    drop_unanswered: bool = False

    def encode(self, rows: Rows) -> tuple[Tokens, np.ndarray]:
        """The tokens of `rows` in memory, and the positions of the rows that were encoded.

        Raises: as `encode_into`.
        """
        collected = Collected()
        report = self.encode_into(rows, collected)
        return self.tokens(collected.sequences()), report.positions

    def encode_into(self, rows: Rows, sink: Sink) -> EncodingReport:
        """Give the tokens of `rows` to `sink`, `ROWS_AT_ONCE` rows at a time, and log what was cut or left out.

        Raises:
            DataError: naming examples that have no answer, or no answer token, in the text or after it was cut.
        """
        render, chat = self.renderer.of(rows.format), self.renderer.is_chat(rows.format)
        cut: list[np.ndarray] = []
        answered: list[np.ndarray] = []
        for ids, table in rows.shards():
            records = zip(table.to_pylist(), ids.to_pylist(), strict=True)
            examples = [self._render(render, row, name) for row, name in records]
            encoded = self._tokenize(examples, chat=chat)
            cut.append(np.array([len(tokens) > self.max_length for tokens, _ in encoded]))
            encoded = [(tokens[: self.max_length], mask[: self.max_length]) for tokens, mask in encoded]
            answered.append(np.array([bool(mask[1:].any()) for _, mask in encoded]))
            with_answer = np.flatnonzero(answered[-1]).tolist()
            if with_answer:
                sink.add(_shard([encoded[k] for k in with_answer], [examples[k].prompt for k in with_answer]))
        was_cut, has_answer = np.concatenate(cut), np.concatenate(answered)
        left_out = np.flatnonzero(~has_answer)
        report = EncodingReport(len(rows), int((was_cut & has_answer).sum()), left_out, int(was_cut[left_out].sum()))
        self.say(rows, report)
        return report

    def tokens(self, sequences: Sequences, subtasks: np.ndarray | None = None) -> Tokens:
        """Sequences as a payload; see `Tokens`."""
        return Tokens(
            *sequences,
            subtasks=subtasks,
            pad=self.tokenizer.pad_token_id,
            max_length=self.max_length,
            packed=self.packed,
        )

    def say(self, rows: Rows, report: EncodingReport) -> None:
        """Warn of examples that were cut or left out.

        Raises:
            DataError: if examples would be left out without `drop_unanswered`, or no example is left.
        """
        if len(report.left_out):
            description = (
                f"{len(report.left_out)} examples of {rows.name} have no answer token ({report.left_out_cut} of them "
                f"after they were cut to {self.max_length} tokens), such as "
                f"{rows.ids.take(pa.array(report.left_out[:3])).to_pylist()}"
            )
            if not self.drop_unanswered:
                raise DataError(f"{description}: raise max_tokens, remove them, or set drop: true to leave them out")
            if not len(report):
                raise DataError(f"{description}: nothing is left of {rows.name}")
            log.warning("%s: they are left out", description)
        if report.cut:
            log.warning(
                "%s: %d of %d examples were cut to %d tokens (max_tokens)",
                rows.name,
                report.cut,
                len(report),
                self.max_length,
            )

    def _render(
        self, render: Callable[[Mapping[str, Any], str], Example], row: Mapping[str, Any], name: str
    ) -> Example:
        """A row as text, or `UNANSWERED` if it has no answer and may be left out."""
        try:
            return render(row, name)
        except UnansweredError:
            if not self.drop_unanswered:
                raise
            return UNANSWERED

    def _tokenize(self, examples: list[Example], *, chat: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids and loss mask of each example, uncut."""
        if chat and self.renderer.marked:
            return [(np.array(ids, np.int32), mask) for ids, mask in (e.encoded for e in examples if e.encoded)]
        # A chat template writes the special tokens itself.
        encoding = self.tokenizer(
            [e.text for e in examples],
            add_special_tokens=not chat,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        encoded = []
        end = self.tokenizer.eos_token_id
        for example, ids, offsets in zip(examples, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            tokens, spans = np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)
            mask = np.zeros(len(tokens), dtype=bool)
            for begin, stop in example.answers:
                mask |= (spans[:, 0] >= begin) & (spans[:, 1] <= stop) & (spans[:, 1] > spans[:, 0])
            if not chat and end is not None and (not len(tokens) or tokens[-1] != end):
                tokens, mask = np.append(tokens, np.int32(end)), np.append(mask, bool(example.answers))
            encoded.append((tokens, mask))
        return encoded


def _shard(encoded: list[tuple[np.ndarray, np.ndarray]], prompts: list[str]) -> Sequences:
    return Sequences(
        ids=np.concatenate([tokens for tokens, _ in encoded]),
        loss_mask=np.concatenate([mask for _, mask in encoded]),
        offsets=np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in encoded])]).astype(np.int64),
        texts=pa.array(prompts, pa.large_string()),
    )
