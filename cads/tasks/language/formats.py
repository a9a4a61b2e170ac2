"""Formats of text examples: from a row to text, and the characters of it that are answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cads.errors import ConfigError, DataError

Format = Literal["messages", "prompt", "text"]
ROLES = ("system", "user", "assistant")
GENERATION = "{% generation"
"""Start of the block that marks the assistant's part in a chat template."""

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Pairs of columns that are recognised as prompt and response."""


class UnansweredError(DataError):
    """An example has nothing to learn from: no answer, or an empty one."""


@dataclass(frozen=True)
class Example:
    """One example as text.

    Attributes:
        text: the whole text. prompt: the first message of the user, the prompt, or the text itself.
        answers: spans of characters that count in the loss, as (begin, end).
        encoded: token ids and loss mask, where the chat template marks the assistant's part; else None.
    """

    text: str
    prompt: str
    answers: tuple[tuple[int, int], ...] = ()
    encoded: tuple[list[int], np.ndarray] | None = None


UNANSWERED = Example("", "", encoded=([], np.zeros(0, dtype=bool)))
"""Stands for an example without an answer: no token, and an empty loss mask."""


def recognise(columns: Sequence[str], location: str) -> tuple[Format, dict[str, str]]:
    """The format that the names of the columns suggest, and the column of each role.

    Args:
        columns: names of the columns. location: of the data, for the message.

    Raises:
        DataError: if no format fits.
    """
    if "messages" in columns:
        return "messages", {"messages": "messages"}
    for prompt, response in PAIRS:
        if prompt in columns and response in columns:
            return "prompt", {"prompt": prompt, "response": response}
    if "text" in columns:
        return "text", {"text": "text"}
    raise DataError(
        f"{location} has columns {list(columns)}, in which no format is recognised: name format (messages, prompt or "
        "text) and columns, such as {prompt: question, response: answer}"
    )


def needed_columns(chosen: Format) -> tuple[str, ...]:
    """The roles that a format needs a column for."""
    return {"messages": ("messages",), "prompt": ("prompt", "response"), "text": ("text",)}[chosen]


class Renderer:
    """Turns rows into text, with the spans of the answers.

    Args:
        tokenizer: its chat template is used.
        separator: between prompt and response, where they are not written as a chat.
        chat: whether prompts and responses are written as a chat; None: if the tokenizer has a chat template.

    Raises:
        ConfigError: if `chat` is true and there is no chat template.
    """

    def __init__(self, tokenizer: Any, separator: str = "\n", chat: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.separator = separator
        template = tokenizer.chat_template
        if chat and not template:
            raise ConfigError(_no_template(tokenizer))
        self.chat = bool(template) if chat is None else chat
        self.marked = isinstance(template, str) and GENERATION in template.replace("{%-", "{%")

    def of(self, chosen: Format) -> Callable[[Mapping[str, Any], str], Example]:
        """The function that renders rows of a format: (row, id) -> Example, or UnansweredError.

        Raises:
            ConfigError: if the format needs a chat template and there is none.
        """
        if chosen == "messages" and not self.tokenizer.chat_template:
            raise ConfigError(_no_template(self.tokenizer))
        return {"messages": self._conversation, "prompt": self._pair, "text": self._plain}[chosen]

    def is_chat(self, chosen: Format) -> bool:
        """Whether a format is written by the chat template, special tokens included."""
        return chosen == "messages" or (chosen == "prompt" and self.chat)

    def _plain(self, row: Mapping[str, Any], identity: str) -> Example:
        text = _string(row["text"], "text", identity)
        return Example(text, text, ((0, len(text)),))

    def _pair(self, row: Mapping[str, Any], identity: str) -> Example:
        prompt = _string(row["prompt"], "prompt", identity)
        if row.get("context"):
            prompt = f"{prompt}\n\n{_string(row['context'], 'context', identity)}"
        response = _string(row["response"], "response", identity)
        if not response.strip():
            raise UnansweredError(_no_answer(identity, "an empty"))
        if self.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            return self._rendered(turns, identity)
        begin = f"{prompt}{self.separator}"
        return Example(begin + response, prompt, ((len(begin), len(begin) + len(response)),))

    def _conversation(self, row: Mapping[str, Any], identity: str) -> Example:
        messages = check_messages(row["messages"], identity)
        return self._rendered(messages, identity)

    def _rendered(self, messages: list[dict[str, str]], identity: str) -> Example:
        prompt = next(m["content"] for m in messages if m["role"] == "user")
        text = self._render(messages, identity)
        if self.marked:
            encoded = self._render(
                messages, identity, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return Example(
                text, prompt, encoded=(encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool))
            )
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], identity, add_generation_prompt=True)
            after = text if i == len(messages) - 1 else self._render(messages[: i + 1], identity)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise DataError(
                    f"the chat template writes the beginning of example {identity!r} differently when more follows, so "
                    f"that answer {i} cannot be found in it: mark the answers in the template with "
                    "{% generation %}, or use another template"
                )
            # Whitespace that a template writes after a turn belongs to the next turn.
            spans.append((len(before), len(after.rstrip())))
        return Example(text, prompt, tuple(spans))

    def _render(self, messages: list[dict[str, str]], identity: str, **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses example {identity!r}: {error}") from error


def check_messages(messages: Any, identity: str) -> list[dict[str, str]]:
    """A conversation to train on: an optional system message, then user and assistant in turn.

    Raises:
        UnansweredError: naming the example, if an answer is empty, or there is no answer.
        DataError: naming the example, if it is not such a conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"example {identity!r} has messages = {messages!r:.60}: give a list of role and content")
    turns: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"example {identity!r} has the message {message!r:.60}: each needs role and content")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"example {identity!r} has the role {role!r}: use {', '.join(ROLES)}")
        turns.append({"role": role, "content": _string(message.get("content"), f"content of {role}", identity)})
    roles = [t["role"] for t in turns if t["role"] != "system"]
    late_system = any(t["role"] == "system" for t in turns[1:])
    if late_system or not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise DataError(
            f"example {identity!r} has the roles {[t['role'] for t in turns]}, which do not alternate: at most one "
            "system message first, then user and assistant in turn"
        )
    answers = [t["content"] for t in turns if t["role"] == "assistant"]
    if not answers or not all(a.strip() for a in answers):
        raise UnansweredError(_no_answer(identity, "an empty" if answers else "no"))
    return turns


def _string(value: Any, name: str, identity: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"example {identity!r} has {name} = {value!r:.60}: it must be text")
    return value


def _no_answer(identity: str, quantifier: str) -> str:
    return f"example {identity!r} has {quantifier} answer: remove it, give one, or set drop: true to leave it out"


def _no_template(tokenizer: Any) -> str:
    return (
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which messages need: use the tokenizer of an "
        "instruction-tuned model, set tokenizer.chat_template and save it, or give prompt and response"
    )
