"""From rows of text to tokens: loss masks, examples that are cut, and examples that are left out."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cads.errors import DataError
from cads.tasks.language.conversations import UnansweredError, UnusableError, is_blank
from cads.tasks.language.formats import UNUSED, Example, Findings, Renderer
from cads.tasks.language.rows import Rows
from cads.tasks.language.tokens import Collected, Sequences, Sink, Tokens
from cads.tasks.language.written_json import as_rows

log = logging.getLogger(__name__)

FEW_LEARNED = 0.01
"""Share of learned tokens below which a source is warned of: most of its examples may not be read as they are meant."""
SHOWN_REASONS = 3
"""Reasons for which examples cannot be used that are shown, the most frequent first."""
SHOWN_IDS = 3

NO_SEQUENCES = Sequences(
    np.empty(0, np.int32), np.empty(0, bool), np.zeros(1, np.int64), pa.array([""], pa.large_string())[:0]
)
"""What a source adds of which no example can be used."""


class EncodedExample(NamedTuple):
    """One example as tokens.

    Attributes:
        tokens: token ids, int32, shape (T,). mask: whether each counts in the loss, bool, shape (T,).
        first: the first token with a visible part of an answer that can be predicted; T if there is none.
    """

    tokens: np.ndarray
    mask: np.ndarray
    first: int


@dataclass(frozen=True)
class EncodingReport:
    """How many rows of one source were cut and left out when they were encoded.

    Attributes:
        rows: number of rows.
        cut: number of encoded rows that were cut.
        left_out: positions of the rows that are left out, ascending, int64: they cannot be used, or no token of an
            answer is learned.
        left_out_cut: number of rows in `left_out` that were cut.
        unusable: positions of the rows that cannot be used, ascending, int64; part of `left_out`.
        reasons: why they cannot be used, the most frequent reasons.
        notes: what else is to be said of the rows, one sentence each.
    """

    rows: int
    cut: int
    left_out: np.ndarray
    left_out_cut: int
    unusable: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
    def stored(self) -> dict[str, Any]:
        """All of the report but `left_out`, as JSON values."""
        said = {"unusable": self.unusable.tolist(), "reasons": list(self.reasons), "notes": list(self.notes)}
        return {**self.counts, **said}

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
        drop_unanswered: leave out examples that cannot be used or have no answer token, instead of refusing them.
    """

    tokenizer: Any
    renderer: Renderer
    max_length: int
    packed: bool = False
    drop_unanswered: bool = False

    def encode(self, rows: Rows) -> tuple[Tokens, np.ndarray]:
        """The tokens of `rows` in memory, and the positions of the rows that were encoded.

        Raises: as `encode_into`; a DataError too if no example is left.
        """
        collected = Collected()
        report = self.encode_into(rows, collected)
        if not len(report):
            reasons = f" (they have {'; '.join(report.reasons)})" if report.reasons else ""
            raise DataError(f"nothing is left of {rows.name}, as no example can be used{reasons}: repair them")
        return self.tokens(collected.sequences()), report.positions

    def encode_into(self, rows: Rows, sink: Sink) -> EncodingReport:
        """Give the tokens of `rows` to `sink`, `ROWS_AT_ONCE` rows at a time, and log what was cut or left out.

        Raises:
            DataError: naming examples that cannot be used, or have no answer token, in the text or after it was cut.
        """
        findings = Findings()
        write, chat = self.renderer.of(rows.format, findings), self.renderer.is_chat(rows.format)
        cut: list[np.ndarray] = []
        answered: list[np.ndarray] = []
        unusable: dict[int, str] = {}
        shares = _Shares()
        for ids, table in rows.shards():
            start, examples = sum(map(len, cut)), []
            for k, (row, name) in enumerate(zip(as_rows(table), ids.to_pylist(), strict=True)):
                try:
                    examples.append(write(row, name))
                except UnusableError as error:
                    self._check_dropped(error)
                    examples.append(UNUSED)
                    if not isinstance(error, UnansweredError):
                        unusable[start + k] = error.reason
            encoded = self._tokenize(examples, chat=chat)
            cut.append(np.array([len(e.tokens) > self.max_length for e in encoded]))
            answered.append(np.array([e.first < min(len(e.tokens), self.max_length) for e in encoded]))
            usable = np.flatnonzero(answered[-1]).tolist()
            if usable:
                shard = _shard([encoded[k] for k in usable], [examples[k].prompt for k in usable], self.max_length)
                shares.add(shard)
                sink.add(shard)
        if shares.example is None:
            # Other sources may fill the split.
            sink.add(NO_SEQUENCES)
        was_cut, has_answer = np.concatenate(cut), np.concatenate(answered)
        left_out = np.flatnonzero(~has_answer)
        report = EncodingReport(
            len(rows),
            int((was_cut & has_answer).sum()),
            left_out,
            int(was_cut[left_out].sum()),
            np.array(list(unusable), dtype=np.int64),
            tuple(reason for reason, _ in Counter(unusable.values()).most_common(SHOWN_REASONS)),
            (*findings.notes(), *shares.notes(self.tokenizer)),
        )
        self.say(rows, report)
        return report

    def tokens(self, sequences: Sequences, subtasks: np.ndarray | None = None) -> Tokens:
        """Sequences as a payload; see `Tokens`.

        Raises:
            DataError: if there are none, as all examples were left out.
        """
        if len(sequences.offsets) < 2:
            raise DataError(
                "nothing is left, as no example can be used (the warnings before this say of which source, and why): "
                "repair them, give the format and columns that fit, or raise max_tokens"
            )
        return Tokens(
            *sequences,
            subtasks=subtasks,
            pad=self.tokenizer.pad_token_id,
            max_length=self.max_length,
            packed=self.packed,
        )

    def say(self, rows: Rows, report: EncodingReport) -> None:
        """Warn of examples that were cut or left out, and of what is not used.

        Raises:
            DataError: if examples would be left out without `drop_unanswered`.
        """
        unanswered = np.setdiff1d(report.left_out, report.unusable)
        if len(unanswered):
            description = (
                f"{len(unanswered)} examples of {rows.name} have no answer token ({report.left_out_cut} of them "
                f"after they were cut to {self.max_length} tokens), such as {_ids(rows, unanswered)}"
            )
            if not self.drop_unanswered:
                raise DataError(f"{description}: raise max_tokens, remove them, or set drop: true to leave them out")
            log.warning("%s: they are left out", description)
        if len(report.unusable):
            description = (
                f"{len(report.unusable)} examples of {rows.name} cannot be used, such as {_ids(rows, report.unusable)} "
                f"(they have {'; '.join(report.reasons)})"
            )
            log.warning("%s: they are left out", description)
        if report.cut:
            log.warning(
                "%s: %d of %d examples were cut to %d tokens (max_tokens)",
                rows.name,
                report.cut,
                len(report),
                self.max_length,
            )
        for note in report.notes:
            log.warning("%s: %s", rows.name, note)

    def _check_dropped(self, error: UnusableError) -> None:
        """Raises: the error, if examples that cannot be used are not left out."""
        if self.drop_unanswered:
            return
        if isinstance(error, UnansweredError):
            raise error
        raise DataError(f"{error}; repair or remove it, or set drop: true to leave out what cannot be used") from error

    def _tokenize(self, examples: list[Example], *, chat: bool) -> list[EncodedExample]:
        """Token ids and loss mask of each example, uncut.

        A token that holds any character of an answer counts in the loss, also if it begins before the answer or ends
        after it. The end token counts after a text of which something is learned.
        """
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
            tokens, spans = np.array(ids, dtype=np.int32), whole_spans(np.array(offsets, dtype=np.int64).reshape(-1, 2))
            mask = np.zeros(len(tokens), dtype=bool)
            for begin, stop in example.answers:
                mask |= (spans[:, 1] > begin) & (spans[:, 0] < stop) & (spans[:, 1] > spans[:, 0])
            first = _first_visible(example, spans, mask)
            if not chat and end is not None:
                learned = first < len(tokens)
                if not len(tokens) or tokens[-1] != end:
                    first = first if learned else len(tokens) + 1
                    tokens, mask = np.append(tokens, np.int32(end)), np.append(mask, learned)
                else:
                    # Some tokenizers write the end token themselves.
                    mask[-1] = learned
            encoded.append(EncodedExample(tokens, mask, first))
        return encoded


def whole_spans(offsets: np.ndarray) -> np.ndarray:
    """The characters of each token, shape (T, 2), also of those whose white space a tokenizer does not count.

    Byte-level tokenizers may trim white space off the offsets of a token, so that a token of white space has none.
    """
    spans = offsets.copy()
    ends = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))[:-1]
    trimmed = (spans[:, 0] == spans[:, 1]) & (spans[:, 1] > ends)
    spans[trimmed, 0] = ends[trimmed]
    return spans


def _first_visible(example: Example, spans: np.ndarray, mask: np.ndarray) -> int:
    """The first learned token, beside the first of all, with a visible character of an answer; T if there is none."""
    for k in np.flatnonzero(mask).tolist():
        begin, end = spans[k].tolist()
        pieces = (example.text[max(begin, b) : min(end, e)] for b, e in example.answers)
        if k > 0 and not all(is_blank(piece) for piece in pieces):
            return k
    return len(mask)


def _ids(rows: Rows, positions: np.ndarray) -> list[str]:
    """The ids of the first rows at `positions`."""
    ids: list[str] = rows.ids.take(pa.array(positions[:SHOWN_IDS])).to_pylist()
    return ids


class _Shares:
    """How many tokens are learned, with the first example."""

    def __init__(self) -> None:
        self.total = self.learned = 0
        self.example: Sequences | None = None

    def add(self, shard: Sequences) -> None:
        self.example = self.example or shard
        self.total += len(shard.ids)
        self.learned += int(shard.loss_mask.sum())

    def notes(self, tokenizer: Any) -> tuple[str, ...]:
        """A warning with an example, if few tokens are learned."""
        if self.example is None or self.learned >= FEW_LEARNED * self.total:
            return ()
        ids, mask = (x[: self.example.offsets[1]] for x in (self.example.ids, self.example.loss_mask))
        learned, before = tokenizer.decode(ids[mask]), tokenizer.decode(ids[: int(mask.argmax())])
        return (
            f"{self.learned} of {self.total} tokens are learned ({self.learned / self.total:.2%}); the first example "
            f"learns {learned!r:.60} after {before[-60:]!r}: check format and columns, or shorten the prompts",
        )


def _shard(encoded: list[EncodedExample], prompts: list[str], max_length: int) -> Sequences:
    cut = [(e.tokens[:max_length], e.mask[:max_length]) for e in encoded]
    return Sequences(
        ids=np.concatenate([tokens for tokens, _ in cut]),
        loss_mask=np.concatenate([mask for _, mask in cut]),
        offsets=np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in cut])]).astype(np.int64),
        texts=pa.array(prompts, pa.large_string()),
    )
