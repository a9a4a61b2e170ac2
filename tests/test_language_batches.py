"""Batches of similar length: every example once an epoch, a function of seed and step, and hardly any padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cads.draws import WINDOW, Draws, Epochs, Weighted
from cads.task import Pool
from cads.tasks.language_tokens import Tokens

SEEDS = st.integers(0, 2**63 - 1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pool(sizes, name="pool"):
    """Sequences of these lengths, whose last half is answers."""
    sizes = np.asarray(sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    learned = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes) >= np.repeat(sizes, sizes) // 2
    ids = np.arange(offsets[-1], dtype=np.int32) % 97
    names = [f"{name}-{i}" for i in range(len(sizes))]
    return Pool(names, Tokens(ids, learned, offsets, pa.array(names, pa.large_string())), name=name)


def random_pool(n, seed=0, name="pool"):
    return pool(np.random.default_rng(seed).integers(4, 200, n), name)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 300), size=st.integers(1, 16), seed=SEEDS)
def test_a_window_holds_what_the_stream_has_there(n, size, seed):
    examples = random_pool(n)
    stream = Epochs(np.arange(n), seed)
    batches = max(1, min(WINDOW, n // size))
    for window in (0, 2):
        steps = range(window * batches, (window + 1) * batches)
        draws = Draws(examples, [stream], size, seed=7)
        drawn = np.concatenate([p.positions for step in steps for p in draws.batches(step)])
        assert sorted(drawn) == sorted(stream.take(window * batches * size, batches * size))


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, steps=st.lists(st.integers(0, 90), min_size=1, max_size=6), weighted=st.booleans())
def test_a_step_does_not_depend_on_the_steps_before_it(seed, steps, weighted):
    examples, target = random_pool(150), random_pool(40, 1, "target")

    def draws():
        stream = Weighted(np.arange(150.0), seed) if weighted else Epochs(np.arange(150), seed)
        return Draws(examples, [stream], 7, target=target, target_fraction=0.3, seed=1)

    used = draws()
    for step in steps:
        fresh, again = draws().batches(step), used.batches(step)
        assert [p.positions.tolist() for p in fresh] == [p.positions.tolist() for p in again]
        assert sum(map(len, fresh)) == 7


def test_a_small_pool_is_not_repeated_within_a_batch():
    examples = random_pool(24)
    draws = Draws(examples, [Epochs(np.arange(24), 3)], 8)
    for epoch in range(5):
        seen = [i for step in range(3) for i in draws.batches(3 * epoch + step)[0].positions.tolist()]
        assert sorted(seen) == list(range(24))


def test_the_order_of_the_batches_is_drawn():
    examples = random_pool(512)
    draws = Draws(examples, [Epochs(np.arange(512), 3)], 16)
    longest = [draws.batches(step)[0].inputs["input_ids"].shape[1] for step in range(32)]
    assert longest != sorted(longest)
    assert abs(np.corrcoef(longest, np.arange(32))[0, 1]) < 0.6
    other = Draws(examples, [Epochs(np.arange(512), 3)], 16, seed=1)
    assert longest != [other.batches(step)[0].inputs["input_ids"].shape[1] for step in range(32)]


def test_replicas_have_streams_of_their_own():
    examples = random_pool(100)
    streams = [Epochs(np.arange(100), s) for s in range(2)]
    draws = Draws(examples, streams, 5)
    together = draws.batches(4)[0].positions.reshape(2, 5)
    for row, stream in zip(together, streams, strict=True):
        assert torch.equal(row, draws.only(stream).batches(4)[0].positions)


def padding(examples, size):
    """Share of the positions of an epoch (at least a window) that are padding."""
    draws = Draws(examples, [Epochs(np.arange(len(examples)), 0)], size)
    steps = max(WINDOW, len(examples) // size)
    batches = [p for step in range(steps) for p in draws.batches(step)]
    real = sum(int(p.inputs["attention_mask"].sum()) for p in batches)
    return 1 - real / sum(p.tokens for p in batches)


def words(text):
    """About as many tokens as a tokenizer makes of it: four characters each."""
    return max(2, len(text) // 4)


@pytest.mark.parametrize("size", [8, 32])
def test_hardly_any_padding_on_gsm8k(size):
    file = SHARED / "gsm8k_train.jsonl"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert padding(pool([words(r["question"] + r["answer"]) for r in rows]), size) < 0.1


@pytest.mark.parametrize("size", [8, 32])
def test_hardly_any_padding_on_chatterbot(size):
    corpus = pytest.importorskip("chatterbot_corpus")
    import yaml

    sizes = []
    for file in sorted((Path(corpus.__file__).parent / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text())["conversations"]:
            # In a chat template every turn has four more tokens around it.
            sizes.append(8 + words(" ".join(map(str, turns[:2]))))
    assert len(sizes) > 1000
    assert padding(pool(sizes), size) < 0.1
