"""Prompts and responses: as plain text, and as conversations of which the response is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cads.tasks.language.conversations import (
    Conversation,
    Message,
    UnansweredError,
    content_text,
    is_blank,
    messages_in,
    read_conversation,
    read_history,
    read_messages,
)

Remark = Callable[[str, Any], None]
"""Takes what is noticed of a row, and an example of it."""


def has_messages(row: Mapping[str, Any]) -> bool:
    """Whether prompt or response is a list of messages."""
    return bool(messages_in(row["prompt"]) or messages_in(row["response"]))


def prompt_of(row: Mapping[str, Any], identity: str) -> str:
    """The prompt as text, with its context."""
    prompt, context = content_text(row["prompt"], "prompt", identity), optional_text(row, "context", identity)
    return f"{prompt}\n\n{context}" if context else prompt


def response_of(row: Mapping[str, Any], identity: str, remark: Remark) -> str:
    """The response as text, or the first of several, as in SQuAD.

    Raises:
        UnansweredError: if there is none, or it is empty.
    """
    value = row["response"]
    several = value.get("text") if isinstance(value, Mapping) else value
    if isinstance(several, list):
        if not several:
            raise UnansweredError(identity, "no")
        texts = [content_text(text, "response", identity) for text in several]
        if len(set(texts)) > 1:
            remark("the first of several responses is learned, the others are not used", texts)
        response = texts[0]
    else:
        response = content_text(value, "response", identity)
    if is_blank(response):
        raise UnansweredError(identity, "an empty")
    return response


def plain_prompt(row: Mapping[str, Any], identity: str, separator: str, known: frozenset[str]) -> str:
    """All that stands before the response where no chat is written: system, earlier turns, prompt, separator."""
    system, history = optional_text(row, "system", identity), row.get("history")
    if is_plain_history(history):
        earlier = f"{history}\n\n" if str(history).strip() else ""
    else:
        earlier = "".join(
            message["content"] + ("\n\n" if message["role"] == "assistant" else separator)
            for message in read_history(history, identity, known)
        )
    begin = f"{system}\n\n" if system else ""
    return f"{begin}{earlier}{prompt_of(row, identity)}{separator}"


def pair_as_chat(row: Mapping[str, Any], identity: str, known: frozenset[str], remark: Remark) -> Conversation:
    """Prompt and response as a chat of which the last answer is learned."""
    asked, history = prompt_of(row, identity), row.get("history")
    response = response_of(row, identity, remark)
    earlier: list[Message] = []
    if is_plain_history(history):
        asked = f"{history}\n\n{asked}" if str(history).strip() else asked
    else:
        earlier = read_history(history, identity, known)
    messages = [*earlier, {"role": "user", "content": asked}, {"role": "assistant", "content": response}]
    messages = [{**m, "weight": int(i == len(messages) - 1)} for i, m in enumerate(messages)]
    system = optional_text(row, "system", identity)
    return read_conversation(messages, identity, known=known, system=system or None, tools=row.get("tools"))


def continuation_as_chat(row: Mapping[str, Any], identity: str, known: frozenset[str]) -> Conversation:
    """Prompt and response as lists of messages: only what the assistant says in the response is learned."""
    parts = []
    for name, role in (("prompt", "user"), ("response", "assistant")):
        given = messages_in(row[name]) or [{"role": role, "content": content_text(row[name], name, identity)}]
        parts.append(read_messages(given, name, identity, known))
    messages = [{**m, "weight": 0} for m in parts[0].messages]
    messages += [{**m, "weight": int(w)} for m, w in zip(parts[1].messages, parts[1].learned, strict=True)]
    if context := optional_text(row, "context", identity):
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if asked is not None:
            messages[asked] = {**messages[asked], "content": f"{messages[asked]['content']}\n\n{context}"}
    history = read_history(row.get("history"), identity, known)
    messages = [{**m, "weight": 0} for m in history] + messages
    return read_conversation(messages, identity, known=known, system=row.get("system"), tools=row.get("tools"))


def optional_text(row: Mapping[str, Any], role: str, identity: str) -> str:
    """The text of a column that a row may lack."""
    value = row.get(role)
    return "" if value is None or value == "" else content_text(value, role, identity)


def is_plain_history(history: Any) -> bool:
    """Whether earlier turns are one text, and not a list."""
    return isinstance(history, str) and not history.lstrip().startswith("[")
