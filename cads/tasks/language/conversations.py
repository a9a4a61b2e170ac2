"""Conversations: what data sets write in many ways, as a chat template takes it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cads.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant")
"""Roles that every chat template is taken to write; it must name all others."""
FIRST_ROLES = ("system", "developer")
"""Roles that stand before the user's first message, and nowhere else."""
REPLYING_ROLES = ("tool", "function", "ipython")
"""Roles of what tools return. It follows an answer, and an answer follows it."""
SPEAKERS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Other names of roles, as in ShareGPT."""
TOOL_SPEAKERS = ("observation", "function_response")
"""Other names of the role of tools; a template may know them as they are."""
OWN_KEYS = ("role", "from", "content", "value", "weight")
"""Keys of a message that are read here. All others go to the chat template."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that hold text."""
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Categories of Unicode that show nothing."""


class UnusableError(DataError):
    """A row that cannot be used, alone of all.

    Attributes:
        reason: what is wrong with it, without its id.
    """

    def __init__(self, identity: str, reason: str) -> None:
        super().__init__(f"example {identity!r} has {reason}")
        self.reason = reason


class UnansweredError(UnusableError):
    """An example has nothing to learn from: no answer, or an empty one."""

    def __init__(self, identity: str, quantifier: str, detail: str = "") -> None:
        super().__init__(
            identity,
            f"{quantifier} answer{detail}: remove it, give one, or set drop: true to leave it out",
        )


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets.

    Attributes:
        messages: role and content (text), and what further keys hold; keys without a value are absent.
        learned: whether each message counts in the loss, as many as `messages`.
        tools: the tools that the assistant may call, or None.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[Any] | None = None

    def without(self, key: str, at: int | None = None) -> Conversation:
        """The conversation without a key of its messages (of that message alone), or without "tools"."""
        if key == "tools":
            return replace(self, tools=None)
        messages = [
            {k: v for k, v in message.items() if k != key} if at is None or at == i else message
            for i, message in enumerate(self.messages)
        ]
        return replace(self, messages=messages)


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or all spaces, controls and marks of no width."""
    return not text.strip() or all(unicodedata.category(letter) in INVISIBLE for letter in text)


def read_conversation(
    value: Any, identity: str, *, known: frozenset[str], system: Any = None, tools: Any = None
) -> Conversation:
    """A conversation to train on: a system message, if any, then user and assistant in turn, and tools' replies.

    Args:
        value: a list of messages, or JSON that holds one. known: roles that the chat template names.
        system: text of a column for the system message; a system message among the messages goes first.
        tools: a list of tools, or JSON that holds one.

    Raises:
        UnansweredError: naming the example, if an answer is empty, or no answer is learned.
        UnusableError: naming the example, if it is no such conversation.
    """
    conversation = read_messages(value, "messages", identity, known)
    messages, learned = conversation.messages, conversation.learned
    text = "" if system is None else content_text(system, "system", identity)
    if not is_blank(text) and messages[0]["role"] not in FIRST_ROLES:
        messages, learned = [{"role": "system", "content": text}, *messages], [False, *learned]
    check_roles([message["role"] for message in messages], identity)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any(learned):
        detail = " whose weight is not 0" if answers else ""
        raise UnansweredError(identity, "no", detail)
    for message, counts in zip(messages, learned, strict=True):
        if counts and is_blank(message["content"]) and len(message) <= len(("role", "content")):
            raise UnansweredError(identity, "an empty")
    return Conversation(messages, learned, read_tools(tools, identity))


def read_messages(value: Any, name: str, identity: str, known: frozenset[str]) -> Conversation:
    """Messages in any of the ways that are known, in any order of roles.

    Raises:
        UnusableError: naming the example, if one of them cannot be read.
    """
    listed = _listed(value)
    if not listed:
        raise UnusableError(identity, f"{name} = {value!r:.60}: give a list of role and content")
    messages, learned = [], []
    for entry in listed:
        message = _message(entry, identity, known)
        messages.append(message)
        learned.append(_weight(entry, identity) and message["role"] == "assistant")
    return Conversation(messages, learned)


def read_history(value: Any, identity: str, known: frozenset[str]) -> list[Message]:
    """Earlier turns: pairs of question and answer, or messages. They are read, and not learned.

    Raises:
        UnusableError: naming the example, if they are neither.
    """
    listed = _listed(value)
    if listed is None and value is not None and value != "":
        raise UnusableError(identity, f"history = {value!r:.60}: give pairs of question and answer, or messages")
    turns: list[Message] = []
    for entry in listed or []:
        if isinstance(entry, Mapping):
            turns.append(_message(entry, identity, known))
        elif isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) == len(("question", "answer")):
            for role, text in zip(("user", "assistant"), entry, strict=True):
                turns.append({"role": role, "content": content_text(text, "history", identity)})
        else:
            raise UnusableError(identity, f"{entry!r:.60} in history: give pairs of question and answer, or messages")
    return turns


def read_tools(value: Any, identity: str) -> list[Any] | None:
    """The tools of a row: a list of JSON schemas, or JSON that holds one; None if there are none.

    Nulls in them stay, such as a default of null. Those that Arrow adds are gone before, see `as_rows`.

    Raises:
        UnusableError: naming the example, if it is no list of objects.
    """
    listed = _listed(value)
    if listed is None and value is not None and value != "":
        raise UnusableError(identity, f"tools = {value!r:.60}: give a list of JSON schemas")
    tools = [_parsed(tool) for tool in listed or []]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise UnusableError(identity, f"tools = {value!r:.60}: give a list of JSON schemas")
    return tools or None


def check_roles(roles: Sequence[str], identity: str) -> None:
    """Refuse conversations in which user and assistant do not alternate; tools reply between two answers.

    Raises:
        UnusableError: naming the example.
    """
    turns = roles[1:] if roles and roles[0] in FIRST_ROLES else roles
    speakers = ["tool" if role in REPLYING_ROLES else role for role in turns]
    may_follow = {
        None: ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant", "user"),
    }
    before = [None, *speakers[:-1]]
    if not turns or any(role not in may_follow.get(last, ()) for last, role in zip(before, speakers, strict=True)):
        raise UnusableError(
            identity,
            f"the roles {list(roles)}, which do not alternate: at most one system message first, then user and "
            "assistant in turn",
        )


def messages_in(value: Any) -> list[Any] | None:
    """The messages in a cell, as a list or as JSON; None if it holds something else, such as text.

    Text may be JSON and no messages, such as extracted records: see `_is_message`.
    """
    listed = _parsed(value)
    if not isinstance(listed, list) or not listed:
        return None
    if isinstance(value, str):
        return listed if all(_is_message(entry) for entry in listed) else None
    spoken = [isinstance(entry, Mapping) and bool(entry.get("role") or entry.get("from")) for entry in listed]
    return listed if all(spoken) else None


def _is_message(entry: Any) -> bool:
    """Whether what JSON holds is surely a message: a known role says something, or calls tools."""
    spoken = (entry.get("role") or entry.get("from")) if isinstance(entry, Mapping) else None
    if not isinstance(spoken, str):
        return False
    if spoken not in (*ROLES, *FIRST_ROLES, *REPLYING_ROLES, *TOOL_SPEAKERS) and spoken.lower() not in SPEAKERS:
        return False
    content = next((entry[k] for k in ("content", "value") if entry.get(k) is not None), None)
    return isinstance(content, str | list) or (content is None and bool(entry.get("tool_calls")))


def content_text(value: Any, name: str, identity: str) -> str:
    """Text as it is, and whole numbers by their digits.

    Raises:
        UnusableError: naming the example, if it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UnusableError(identity, f"{name} = {value!r:.60}: it must be text")
    return value


def with_arguments_as_json(messages: Sequence[Message]) -> list[Message]:
    """The messages, with the arguments of tool calls as JSON: what some chat templates need."""
    return [
        {**m, "tool_calls": [_call(c, json.dumps) for c in m["tool_calls"]]}
        if isinstance(m.get("tool_calls"), list)
        else m
        for m in messages
    ]


def _listed(value: Any) -> list[Any] | None:
    """A list, given as one, as JSON, or as an object of lists (as `datasets` stores a sequence of objects)."""
    value = _parsed(value)
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) > 1:
            return None
        return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    return list(value) if isinstance(value, list | tuple) else None


def _parsed(value: Any) -> Any:
    """What JSON text holds, if it is an object or a list; else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _message(entry: Any, identity: str, known: frozenset[str]) -> Message:
    spoken = (entry.get("role") or entry.get("from")) if isinstance(entry, Mapping) else None
    if not isinstance(spoken, str):
        raise UnusableError(identity, f"the message {entry!r:.60}: each needs role and content")
    role = SPEAKERS.get(spoken.lower(), spoken)
    if role in TOOL_SPEAKERS and role not in known:
        role = "tool"
    if role not in ROLES and role not in known:
        raise UnusableError(
            identity,
            f"the role {spoken!r}, which the chat template does not name: use {', '.join(ROLES)}, or a tokenizer whose "
            "chat template has that role",
        )
    further = {k: _calls(v) if k == "tool_calls" else v for k, v in entry.items() if k not in OWN_KEYS}
    further = {k: v for k, v in further.items() if v not in (None, "", [], {})}
    content = next((entry[k] for k in ("content", "value") if entry.get(k) is not None), None)
    may_be_absent = role == "assistant" and bool(further)
    return {"role": role, "content": _content(content, role, identity, may_be_absent), **further}


def _content(value: Any, role: str, identity: str, may_be_absent: bool) -> str:
    if value is None and may_be_absent:
        return ""
    parts = [value] if isinstance(value, Mapping) and "type" in value else value
    if not isinstance(parts, list):
        return content_text(value, f"content of {role}", identity)
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in TEXT_PARTS:
            raise UnusableError(
                identity,
                f"a part of type {kind!r} in the content of {role}: cads reads text, no images, sound or files",
            )
        texts.append(
            content_text(part.get("text") if isinstance(part, Mapping) else part, f"content of {role}", identity)
        )
    return "".join(texts)


def _weight(entry: Mapping[str, Any], identity: str) -> bool:
    weight = entry.get("weight")
    if weight is not None and weight not in (0, 1):
        raise UnusableError(identity, f"a message of weight = {weight!r:.60}: use 1 (learned) or 0 (not learned)")
    return weight is None or bool(weight)


def _calls(value: Any) -> Any:
    """Tool calls, their arguments as objects: what chat templates expect. Nulls in them stay."""
    calls = _parsed(value)
    return [_call(c, _parsed) for c in calls] if isinstance(calls, list) else calls


def _call(call: Any, convert: Any) -> Any:
    """A tool call, with its arguments converted."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else dict(call)
