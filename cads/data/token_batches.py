"""Batches of similar length, in the order of ids, for forward passes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env

from cads.data.ids import ascending
from cads.data.pool import Pool
from cads.errors import ConfigError

SCORED_TOKENS = 512
"""Padded tokens in one forward pass on a CPU; the fastest of 128 to 4,096 on two cores."""
SCORED_EXAMPLES = 1024
"""Maximum number of examples in one forward pass on a CPU, for examples without a length."""
ACCELERATOR_TOKENS, ACCELERATOR_EXAMPLES = 4096, 4096
"""The same two on other devices, which compute many tokens in the time of a few. Not measured on one: a single example
as long as the context of most models is a batch of 4,096 tokens, so that its memory is needed in any case."""
SCORED_VALUES = 2**24
"""Maximum number of input values in one forward pass, for examples without a length: 64 MB as float32."""


def device_type() -> str:
    """The type of the device on which this process trains and scores, such as "cpu" or "cuda", as accelerate chooses.

    Nothing is initialised: it is known before any process group or model is made.
    """
    state = PartialState._shared_state
    if "device" in state:
        return str(torch.device(state["device"]).type)
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def scoring_limits(device: torch.device | str | None = None) -> tuple[int, int]:
    """Most padded tokens, and most examples without a length, in one forward pass on `device`.

    Plans and passes both take those of this process's device (None), since the padding that is charged depends on them.
    """
    kind = device_type() if device is None else torch.device(device).type
    return (SCORED_TOKENS, SCORED_EXAMPLES) if kind == "cpu" else (ACCELERATOR_TOKENS, ACCELERATOR_EXAMPLES)


def default_tokens(on_cpu: int) -> int:
    """Padded tokens in one pass by default: `on_cpu`, or the limit of another device (`scoring_limits`)."""
    return on_cpu if device_type() == "cpu" else scoring_limits()[0]


def by_id(pool: Pool) -> np.ndarray:
    """Positions in the order of the ids, int64, shape (N,). This order of examples is the same for a permuted pool."""
    if ascending(pool.ids):
        return np.arange(len(pool))
    return np.asarray(pc.sort_indices(pool.ids)).astype(np.int64)


def in_id_order(pool: Pool, positions: np.ndarray) -> np.ndarray:
    """The positions in the order of their ids, int64, shape (n,)."""
    if ascending(pool.ids):
        return np.sort(positions)
    return positions[np.asarray(pc.sort_indices(pool.ids.take(pa.array(positions))))]


def lengths(pool: Pool) -> np.ndarray | None:
    """Number of tokens of each example, int64, shape (N,), or None if examples have no length."""
    read_lengths = getattr(pool.examples, "lengths", None)
    return np.asarray(read_lengths(), dtype=np.int64) if callable(read_lengths) else None


def budget_batches(length: np.ndarray, ids: pa.Array, tokens: int) -> list[np.ndarray]:
    """Positions in batches of at most `tokens` padded tokens (or of one example), longest first.

    Equal lengths are sorted by id, so that the batches do not depend on the order of the examples.

    Args:
        length: number of tokens of each example, shape (n,).
        ids: one an example.
        tokens: maximum number of padded tokens in a batch.

    Raises:
        ConfigError: if `tokens` is not positive.
    """
    if tokens < 1:
        raise ConfigError(f"a batch of {tokens} tokens holds no example: give at least 1, such as {SCORED_TOKENS}")
    table = pa.table({"length": length, "id": ids})
    order = pc.sort_indices(table, [("length", "descending"), ("id", "ascending")]).to_numpy().astype(np.int64)
    sorted_length = length[order]
    batches, start = [], 0
    while start < len(order):
        count = max(1, tokens // max(1, int(sorted_length[start])))
        batches.append(order[start : start + count])
        start += count
    return batches


def scoring_batches(pool: Pool, *, tokens: int | None = None, positions: np.ndarray | None = None) -> list[np.ndarray]:
    """All positions of `pool` (or only `positions`) in batches for one forward pass.

    Examples with a length are batched by `tokens`, by default the limit of this process's device (`scoring_limits`);
    see `budget_batches`. Other examples are batched in the order of their ids, within the limit of the device and
    `SCORED_VALUES`.
    """
    max_tokens, max_examples = scoring_limits()
    tokens = max_tokens if tokens is None else tokens
    positions = np.arange(len(pool)) if positions is None else np.asarray(positions, dtype=np.int64)
    length, ids = lengths(pool), pool.ids.take(pa.array(positions))
    if length is not None:
        return [positions[rows] for rows in budget_batches(length[positions], ids, tokens)]
    values = max(1, *(x[0].numel() for x in pool.batch(np.zeros(1, dtype=np.int64)).inputs.values()))
    size = max(1, min(max_examples, SCORED_VALUES // values))
    order = positions[np.asarray(pc.sort_indices(ids))]
    return [order[start : start + size] for start in range(0, len(order), size)]
