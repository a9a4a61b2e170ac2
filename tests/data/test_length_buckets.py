"""Batches of similar length: every example once an epoch, a function of seed and step, and hardly any padding."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cads.data.pool import Pool
from cads.data.streams import ShuffledStream, WeightedStream
from cads.data.training_batches import WINDOW, BatchStream, LengthBuckets
from cads.tasks.language.encoding import TokenEncoder
from cads.tasks.language.formats import Renderer
from cads.tasks.language.loading import load_tokenizer
from cads.tasks.language.rows import TextSource, load_rows
from cads.tasks.language.tokens import Tokens, tokens_of
from experiments.pretraining import Shape, write_blank
from tests.support.paths import SHARED
from tests.support.tiny_llama import write_lines

SEEDS = st.integers(0, 2**63 - 1)


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
    stream = ShuffledStream(np.arange(n), seed)
    batches = max(1, min(WINDOW, n // size))
    for window in (0, 2):
        steps = range(window * batches, (window + 1) * batches)
        draws = BatchStream(examples, [stream], size, seed=7)
        drawn = np.concatenate([p.positions for step in steps for p in draws.step(step)])
        assert sorted(drawn) == sorted(stream.take(window * batches * size, batches * size))


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, steps=st.lists(st.integers(0, 90), min_size=1, max_size=6), weighted=st.booleans())
def test_a_step_does_not_depend_on_the_steps_before_it(seed, steps, weighted):
    examples, target = random_pool(150), random_pool(40, 1, "target")

    def draws():
        stream = WeightedStream(np.arange(150.0), seed) if weighted else ShuffledStream(np.arange(150), seed)
        return BatchStream(examples, [stream], 7, target=target, target_fraction=0.3, seed=1)

    used = draws()
    for step in steps:
        fresh, again = draws().step(step), used.step(step)
        assert [p.positions.tolist() for p in fresh] == [p.positions.tolist() for p in again]
        assert sum(map(len, fresh)) == 7


def test_a_small_pool_is_not_repeated_within_a_batch():
    examples = random_pool(24)
    draws = BatchStream(examples, [ShuffledStream(np.arange(24), 3)], 8)
    for epoch in range(5):
        seen = [i for step in range(3) for i in draws.step(3 * epoch + step)[0].positions.tolist()]
        assert sorted(seen) == list(range(24))


def test_the_order_of_the_batches_is_drawn():
    examples = random_pool(512)
    draws = BatchStream(examples, [ShuffledStream(np.arange(512), 3)], 16)
    longest = [draws.step(step)[0].inputs["input_ids"].shape[1] for step in range(32)]
    assert longest != sorted(longest)
    assert abs(np.corrcoef(longest, np.arange(32))[0, 1]) < 0.6
    other = BatchStream(examples, [ShuffledStream(np.arange(512), 3)], 16, seed=1)
    assert longest != [other.step(step)[0].inputs["input_ids"].shape[1] for step in range(32)]


def test_replicas_have_streams_of_their_own():
    examples = random_pool(100)
    streams = [ShuffledStream(np.arange(100), s) for s in range(2)]
    draws = BatchStream(examples, streams, 5)
    together = draws.step(4)[0].positions.reshape(2, 5)
    for row, stream in zip(together, streams, strict=True):
        assert torch.equal(row, draws.for_streams(stream).step(4)[0].positions)


def padding(examples, size):
    """Share of the positions of an epoch (at least a window) that are padding."""
    draws = BatchStream(examples, [ShuffledStream(np.arange(len(examples)), 0)], size)
    steps = max(WINDOW, len(examples) // size)
    batches = [p for step in range(steps) for p in draws.step(step)]
    real = sum(int(p.inputs["attention_mask"].sum()) for p in batches)
    return 1 - real / sum(p.tokens for p in batches)


def encoded(folder, rows, longest):
    """Prompts and responses as tokens of a tokenizer that was trained on some of them."""
    lines = [{"prompt": p, "response": r} for p, r in rows]
    file, some = write_lines(folder / "rows.jsonl", lines), write_lines(folder / "some.jsonl", lines[::10])
    write_blank(folder / "blank", Shape(32, 1, 32), [some], 1000)
    tokens = load_tokenizer(str(folder / "blank"), trust_remote_code=False)
    loaded = load_rows(TextSource(path=str(file)), 0)
    result, _ = TokenEncoder(tokens, Renderer(tokens), longest).encode(loaded)
    return Pool(loaded.ids, result)


def docstrings():
    """What the functions of a library are called and do: every installation has them."""
    result = {}
    for module in (np, np.linalg, np.random, np.fft, np.ma, torch, torch.linalg, nn.functional, torch.special):
        for name in dir(module):
            text = inspect.getdoc(getattr(module, name))
            if callable(getattr(module, name)) and text:
                result[text] = f"What does {module.__name__}.{name} do?"
    return [(name, text) for text, name in result.items() if text.strip()][::3]


def gsm8k():
    file = SHARED / "gsm8k_train.jsonl"
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    return [(r["question"], r["answer"]) for r in map(json.loads, file.read_text().splitlines()[:600])]


def chats():
    corpus = pytest.importorskip("chatterbot_corpus")
    files = sorted((Path(corpus.__file__).parent / "data" / "english").glob("*.yml"))
    turns = [turns for file in files for turns in yaml.safe_load(file.read_text())["conversations"]]
    return [(str(t[0]), str(t[1])) for t in turns if len(t) > 1 and str(t[1]).strip()]


@pytest.mark.parametrize(("texts", "longest"), [(docstrings, 1024), (gsm8k, 384), (chats, 128)])
def test_hardly_any_padding_on_real_text(tmp_path, texts, longest):
    """Cut where the configurations of these data cut."""
    examples = encoded(tmp_path, texts(), longest)
    lengths = tokens_of(examples).lengths()
    assert len(lengths) > 500
    assert lengths.std() > 0.3 * lengths.mean()
    for size in (8, 32):
        assert padding(examples, size) < 0.11


def test_an_example_shares_no_batch_with_itself():
    """A window that straddles two epochs holds some examples twice; of equal length, they would be neighbours."""
    lengths = np.random.default_rng(0).integers(1, 400, 50)
    buckets = LengthBuckets(ShuffledStream(np.arange(50), 3), lengths, 6, 0)
    repeated = [6 - len(np.unique(buckets.batch(step))) for step in range(200)]
    assert np.mean(np.array(repeated) > 0) < 0.05
