"""Formats of text examples: from a row to text, and the characters of it that are answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cads.errors import ConfigError, DataError
from cads.tasks.language.columns import Format
from cads.tasks.language.conversations import (
    Conversation,
    UnansweredError,
    UnusableError,
    content_text,
    is_blank,
    read_conversation,
    read_tools,
    with_arguments_as_json,
)
from cads.tasks.language.pairs import (
    continuation_as_chat,
    has_messages,
    pair_as_chat,
    plain_prompt,
    prompt_of,
    response_of,
)

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
"""Start of the block that marks the assistant's part in a chat template."""
QUOTED = re.compile(r"""["']([\w-]+)["']""")
"""Words in quotes, among which are the roles that a chat template names."""
THOUGHT_END = "</think>"
"""What ends a chain of thought in an answer. Templates leave those of earlier turns out."""
CHECKED = 50
"""Examples in which it is looked whether the chat template writes a key."""
SHOWN = 3
"""Values that are shown of what is not used."""


@dataclass(frozen=True)
class Example:
    """One example as text.

    Attributes:
        text: the whole text. prompt: the first message of the user, the prompt, or the text itself.
        answers: spans of characters that count in the loss, as (begin, end).
    """

    text: str
    prompt: str
    answers: tuple[tuple[int, int], ...] = ()


UNUSED = Example("", "")
"""Stands for an example that is left out: no text, and no answer."""


class Findings:
    """What is noticed while the rows of one source are written, to be said once for all of them."""

    def __init__(self) -> None:
        self._written: set[str] = set()
        self._rows: Counter[str] = Counter()
        self._values: dict[str, list[str]] = {}
        self._remarks: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def is_open(self, key: str) -> bool:
        """Whether it has still to be looked at whether a key is written."""
        return key not in self._written and self._rows[key] < CHECKED

    def is_written(self, key: str) -> bool:
        """Whether a row was found in which `key` is written."""
        return key in self._written

    def add(self, key: str, value: Any, *, written: bool) -> None:
        """A row has a value under `key`, which is written or not."""
        if written:
            self._written.add(key)
            return
        self._rows[key] += 1
        text, values = f"{value!r:.60}", self._values.setdefault(key, [])
        if len(values) < SHOWN and text not in values:
            values.append(text)

    def remark(self, text: str, example: Any) -> None:
        """Something is true of a row, of which `example` is shown."""
        self._remarks[text] += 1
        self._examples.setdefault(text, f"{example!r:.60}")

    def notes(self) -> tuple[str, ...]:
        """What is to be said, one sentence each."""
        unwritten = [key for key in self._values if key not in self._written]
        keys = [
            f"{key} is not written by the chat template and not used, such as {', '.join(self._values[key])}"
            for key in unwritten
        ]
        remarks = [
            f"{text} ({count} examples, such as {self._examples[text]})" for text, count in self._remarks.items()
        ]
        return (*keys, *remarks)


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
        sources = template.values() if isinstance(template, Mapping) else [template or ""]
        self._named_roles = frozenset(word for source in sources for word in QUOTED.findall(source))

    def of(self, chosen: Format, findings: Findings | None = None) -> Callable[[Mapping[str, Any], str], Example]:
        """The function that writes rows of a format: (row, id) -> Example, or UnusableError.

        Args:
            findings: takes what is noticed.

        Raises:
            ConfigError: if the format needs a chat template and there is none.
        """
        if chosen == "messages" and not self.tokenizer.chat_template:
            raise ConfigError(_no_template(self.tokenizer))
        noticed = Findings() if findings is None else findings
        write = {"messages": self._conversation, "prompt": self._pair, "text": self._plain}[chosen]
        return lambda row, identity: write(row, identity, noticed)

    def is_chat(self, chosen: Format) -> bool:
        """Whether a format is written by the chat template, special tokens included."""
        return chosen == "messages" or (chosen == "prompt" and self.chat)

    def _plain(self, row: Mapping[str, Any], identity: str, findings: Findings) -> Example:
        text = content_text(row["text"], "text", identity)
        if is_blank(text):
            raise UnansweredError(identity, "no", ", as its text is empty")
        return Example(text, text, ((0, len(text)),))

    def _pair(self, row: Mapping[str, Any], identity: str, findings: Findings) -> Example:
        if has_messages(row):
            if not self.chat:
                raise ConfigError(
                    f"example {identity!r} has messages as prompt or response, which are written as a chat: "
                    + ("leave chat at null" if self.tokenizer.chat_template else _no_template(self.tokenizer))
                )
            return self._rendered(continuation_as_chat(row, identity, self._named_roles), identity, findings)
        prompt = prompt_of(row, identity)
        if self.chat:
            chat = pair_as_chat(row, identity, self._named_roles, findings.remark)
            return replace(self._rendered(chat, identity, findings), prompt=prompt)
        response = response_of(row, identity, findings.remark)
        if tools := read_tools(row.get("tools"), identity):
            findings.remark("tools are written by chat templates only, and are not used", tools)
        begin = plain_prompt(row, identity, self.separator, self._named_roles)
        return Example(begin + response, prompt, ((len(begin), len(begin) + len(response)),))

    def _conversation(self, row: Mapping[str, Any], identity: str, findings: Findings) -> Example:
        chat = read_conversation(
            row["messages"], identity, known=self._named_roles, system=row.get("system"), tools=row.get("tools")
        )
        if row.get("system") and chat.messages[0]["content"] != row["system"]:
            findings.remark("the system message of the messages is used, and that of the column is not", row["system"])
        return self._rendered(chat, identity, findings)

    def _rendered(self, chat: Conversation, identity: str, findings: Findings) -> Example:
        prompt = next(m["content"] for m in chat.messages if m["role"] == "user")
        try:
            text = self._render(chat, identity)
        except UnusableError:
            # Some templates join the arguments of tool calls to text.
            chat = replace(chat, messages=with_arguments_as_json(chat.messages))
            text = self._render(chat, identity)
        self._check_written(chat, text, identity, findings)
        spans = self._marked_spans(chat, identity)
        if spans is None:
            spans = [self._answer_span(chat, i, text, identity) for i, learned in enumerate(chat.learned) if learned]
        return Example(text, prompt, tuple(spans))

    def _check_written(self, chat: Conversation, text: str, identity: str, findings: Findings) -> None:
        """Notice what the chat template does not write.

        Raises:
            UnansweredError: if nothing of an answer is written.
        """
        given = [("tools", chat.tools)] if chat.tools else []
        given += [(k, v) for m in chat.messages for k, v in m.items() if k not in ("role", "content")]
        for key, value in dict(reversed(given)).items():
            if findings.is_open(key):
                findings.add(key, value, written=not self._is_same(chat.without(key), text, identity))
        for i, (message, learned) in enumerate(zip(chat.messages, chat.learned, strict=True)):
            role, content = message["role"], message["content"].strip()
            if role in ("system", "developer", "user") and content not in text:
                findings.remark(f"the chat template does not write the content of {role} as it is", content)
            for key, value in message.items():
                text_of_key = key not in ("role", "content") and isinstance(value, str)
                if text_of_key and findings.is_written(key) and value.strip() not in text:
                    findings.remark(f"the chat template does not write every {key} as it is", value)
            if not learned or not is_blank(content):
                continue
            further = [key for key in message if key not in ("role", "content")]
            if all(self._is_same(chat.without(key, i), text, identity) for key in further):
                raise UnansweredError(identity, "an empty", f" (the chat template does not write its {further})")

    def _is_same(self, chat: Conversation, text: str, identity: str) -> bool:
        """Whether the chat template writes `text` for another conversation too."""
        try:
            return self._render(chat, identity) == text
        except UnusableError:
            return False

    def _marked_spans(self, chat: Conversation, identity: str) -> list[tuple[int, int]] | None:
        """The answers by the marks of the chat template; None if it has none, or marks not each answer once."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=chat.tools)
        if not GENERATION.search(template):
            return None
        _, (spans,) = render_jinja_template(
            conversations=[chat.messages],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        learned = [learned for m, learned in zip(chat.messages, chat.learned, strict=True) if m["role"] == "assistant"]
        if all(learned):
            return [(begin, end) for begin, end in spans]
        if len(spans) != len(learned):
            return None
        return [(begin, end) for (begin, end), counts in zip(spans, learned, strict=True) if counts]

    def _answer_span(self, chat: Conversation, i: int, text: str, identity: str) -> tuple[int, int]:
        """Where message i stands in `text`, with what ends its turn.

        Raises:
            UnusableError: if it cannot be found.
        """
        earlier = replace(chat, messages=chat.messages[:i])
        before = self._render(earlier, identity, add_generation_prompt=True)
        is_last = i == len(chat.messages) - 1
        # Whitespace that a template writes after a turn belongs to the next turn.
        after = (text if is_last else self._render(replace(chat, messages=chat.messages[: i + 1]), identity)).rstrip()
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        # The prompt for an answer, or the last answer, may be written differently, such as with a chain of thought.
        answer = chat.messages[i]["content"].rpartition(THOUGHT_END)[2].strip()
        begin = _common_start(before, text)
        indent = len(text[begin:]) - len(text[begin:].lstrip())
        # An answer without content is what the template writes of its other keys, such as calls of tools.
        answer = answer or after[begin:].rpartition(THOUGHT_END)[2].strip()
        if answer and answer in after and begin >= len(self._render(earlier, identity).rstrip()):
            turn = answer + after.rpartition(answer)[2]
            if text.startswith(turn, begin + indent):
                return begin, begin + indent + len(turn)
        raise RewrittenError(identity, i)

    def _render(self, chat: Conversation, identity: str, **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                chat.messages, **{"tools": chat.tools, "tokenize": False, **options}
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateRefusedError(identity, error) from error
        return text


class TemplateRefusedError(UnusableError):
    """The chat template does not take an example."""

    def __init__(self, identity: str, error: Exception) -> None:
        DataError.__init__(self, f"the chat template refuses example {identity!r}: {error}")
        self.reason = f"a conversation that the chat template refuses: {error}"


class RewrittenError(UnusableError):
    """The chat template writes an answer of an example differently when more follows."""

    def __init__(self, identity: str, answer: int) -> None:
        remedy = "mark the answers in the template with {% generation %}, or use another template"
        DataError.__init__(
            self,
            f"the chat template writes the beginning of example {identity!r} differently when more follows, so that "
            f"answer {answer} cannot be found in it: {remedy}",
        )
        self.reason = f"an answer that the chat template writes differently when more follows: {remedy}"


def _common_start(one: str, other: str) -> int:
    """The number of characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _no_template(tokenizer: Any) -> str:
    return (
        f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which messages need: use the tokenizer of an "
        "instruction-tuned model, set tokenizer.chat_template and save it, or give prompt and response"
    )
