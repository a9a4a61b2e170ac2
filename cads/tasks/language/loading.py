"""Loading from a folder or the hub: tokenizers, and one message for all that goes wrong with tokenizers and models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cads.errors import ConfigError


def load_tokenizer(
    name: str,
    *,
    trust_remote_code: bool,
    pad_token: str | None = None,
    spare_pad: str | None = None,
    field: str = "pad_token",
) -> Any:
    """A tokenizer with character offsets, to find the answers, and a pad token.

    Args:
        pad_token: None: the tokenizer's own, or else `spare_pad`, if it is one of its tokens.
        field: name of the setting of `pad_token`, for messages.

    Raises:
        ConfigError: if it cannot be loaded, gives no offsets, or has no token to pad with.
    """
    tokenizer = open_tokenizer(name, trust_remote_code=trust_remote_code)
    if pad_token is not None and not _has_token(tokenizer, pad_token):
        raise ConfigError(f"{field} = {pad_token!r} is no token of {name!r}: name one that is, such as its end token")
    if pad_token is None and tokenizer.pad_token_id is None and spare_pad and _has_token(tokenizer, spare_pad):
        pad_token = spare_pad
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer {name!r} has no pad token: set {field} to one of its tokens, such as "
            f"{tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)!r}; it is masked, and never learned"
        )
    return tokenizer


def open_tokenizer(name: str, *, trust_remote_code: bool) -> Any:
    """A tokenizer with character offsets, as it is.

    Raises:
        ConfigError: if it cannot be loaded, or gives no offsets.
    """
    from transformers import AutoTokenizer

    with loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer {name!r} is a slow one, which cannot say where its tokens stand: use a fast one"
        )
    return tokenizer


def _has_token(tokenizer: Any, token: str) -> bool:
    # A string that is no token is converted to the unknown token, which itself is a token.
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and (token_id != tokenizer.unk_token_id or token == tokenizer.unk_token)


@contextmanager
def loading(kind: str, name: str) -> Iterator[None]:
    """Turn what goes wrong on loading into a message, and hide the progress bar of a local folder.

    Args:
        kind: "model" or "tokenizer". name: of it on the hub, or its folder.

    Raises:
        ConfigError: if the block cannot load it, or code that comes with it may not run.
    """
    try:
        with without_progress_bar() if Path(name).is_dir() else nullcontext():
            yield
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {kind} {name!r} comes with code of its own, which is not run: set trust_remote_code: true if you "
                "trust it, or use another model"
            ) from error
        raise ConfigError(f"the {kind} {name!r} cannot be loaded: {error}") from error


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Hide the progress bars of transformers: a folder takes seconds, and a bar only interrupts the output."""
    from transformers.utils import logging as transformers_logging

    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
