"""The chosen examples as trainers read them: conversations, prompts with responses, or text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cads.data.origin import FileOrigin
from cads.errors import DataError, SelectionError
from cads.exports.chosen_rows import ChosenRows
from cads.tasks.language.columns import NEEDED, Format, assign_columns
from cads.tasks.language.conversations import (
    FIRST_ROLES,
    REPLYING_ROLES,
    Conversation,
    content_text,
    read_conversation,
)
from cads.tasks.language.formats import Findings
from cads.tasks.language.pairs import (
    continuation_as_chat,
    has_messages,
    pair_as_chat,
    plain_prompt,
    response_of,
)
from cads.tasks.language.rows import Rows, read_content
from cads.tasks.language.written_json import as_rows

log = logging.getLogger(__name__)

ROLES = frozenset((*FIRST_ROLES, *REPLYING_ROLES))
"""Roles beside user and assistant, which the chat template of the trainer is taken to know."""
SEPARATOR = "\n"
"""Between prompt and response where no chat is written, as in training by default."""


@dataclass(frozen=True)
class TrainingRow:
    """One example.

    Attributes:
        text: all of it, if it is plain text; otherwise empty.
        prompt, response: of an example that is no chat; otherwise empty.
        messages: of a chat, each with role and content; otherwise empty.
        learned: whether each message counts in the loss.
        tools: that the assistant may call, or None.
    """

    text: str = ""
    prompt: str = ""
    response: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    learned: tuple[bool, ...] = ()
    tools: list[Any] | None = None

    @property
    def kind(self) -> str:
        """What it is: "text", "pair" or "chat"."""
        return "chat" if self.messages else ("pair" if self.response else "text")

    @property
    def learns_last(self) -> bool:
        """Whether the last message counts in the loss, and no other."""
        return self.learned == (*([False] * (len(self.learned) - 1)), True)

    @property
    def learns_all(self) -> bool:
        """Whether every message of the assistant counts in the loss."""
        return self.learned == tuple(message["role"] == "assistant" for message in self.messages)

    def to_json(self) -> str:
        """The row on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> TrainingRow:
        """The row of `to_json`."""
        fields = json.loads(line)
        return cls(**{**fields, "messages": tuple(fields["messages"]), "learned": tuple(fields["learned"])})


def training_rows(chosen: ChosenRows, *, chat: bool) -> Iterator[tuple[int, TrainingRow]]:
    """The position of each chosen example in the Selection, once, and the example, in the order of the files.

    Args:
        chat: whether prompts and responses are conversations, which a chat template writes.

    Raises:
        SelectionError: if it is not known what the columns of a file stand for.
        DataError: if an example cannot be read.
    """
    findings = Findings()
    origin = chosen.origin
    for file in chosen.files:
        examples = np.flatnonzero((origin.file == file.index) & (chosen.counts > 0))
        examples = examples[np.argsort(origin.row[examples])]
        form, roles = _roles(origin.files[file.index])
        ids = chosen.selection.ids.take(pa.array(examples))
        content = read_content(file.path, roles)
        rows = Rows(content, form, ids, file.path.name, table_positions=origin.row[examples])
        shards = ((row, name) for names, part in rows.shards() for row, name in _named(part, names))
        for example, (row, identity) in zip(examples.tolist(), shards, strict=True):
            yield example, _row(form, row, identity, findings, chat=chat)
    for note in findings.notes():
        log.warning("%s", note)


def _named(table: pa.Table, names: pa.Array) -> Iterator[tuple[dict[str, Any], str]]:
    return zip(as_rows(table), names.to_pylist(), strict=True)


def _roles(file: FileOrigin) -> tuple[Format, dict[str, str]]:
    """The format of a file, and the column or template of each role."""
    if file.roles is not None:
        form = next((form for form, needed in NEEDED.items() if set(needed) <= set(file.roles)), None)
        if form is None:
            raise SelectionError(f"the roles {sorted(file.roles)} of {file.location} are those of no format")
        return form, dict(file.roles)
    try:
        form, roles = assign_columns([c for c in file.columns if c != file.id_column], None, {}, file.location)
    except DataError as error:
        raise SelectionError(
            f"this Selection, of an earlier version, does not say what the columns of {file.location} stand for, and "
            f"their names do not tell ({error}): select again, or export rows by --to jsonl"
        ) from error
    log.warning(
        "%s: taken for %s by the names of its columns, %s, as an earlier version did not store it",
        file.location,
        form,
        ", ".join(f"{role} = {name}" for role, name in roles.items()),
    )
    return form, roles


def _row(form: Format, row: dict[str, Any], identity: str, findings: Findings, *, chat: bool) -> TrainingRow:
    if form == "text":
        return TrainingRow(text=content_text(row["text"], "text", identity))
    if not chat:
        if form == "messages" or has_messages(row):
            raise DataError(
                f"example {identity!r} is a conversation, which only a chat template writes: leave chat true"
            )
        response = response_of(row, identity, findings.remark)
        return TrainingRow(prompt=plain_prompt(row, identity, SEPARATOR, ROLES), response=response)
    if form == "messages":
        talk = read_conversation(
            row["messages"], identity, known=ROLES, system=row.get("system"), tools=row.get("tools")
        )
    elif has_messages(row):
        talk = continuation_as_chat(row, identity, ROLES)
    else:
        talk = pair_as_chat(row, identity, ROLES, findings.remark)
    return _of_chat(talk)


def _of_chat(talk: Conversation) -> TrainingRow:
    return TrainingRow(messages=tuple(talk.messages), learned=tuple(talk.learned), tools=talk.tools)
