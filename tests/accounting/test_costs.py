"""Costs: measured and analytic accounting agree, CPU attention is counted, and CCDS's figures come out."""

from __future__ import annotations

import logging

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cads.accounting import measured as measured_module
from cads.accounting.architectures import from_config, read_config
from cads.accounting.closed_form import AllWeights, Frozen, Lora, lora_parameters, module_flops, transformer_flops
from cads.accounting.costs import ADAMW_FLOPS, CLIP_FLOPS, Costs
from cads.accounting.measured import attention_self_test, count_flops, measure
from cads.accounting.nominal import CCDS_TOKENS, ccds_parameters, forward_flops, selection_flops, training_flops
from cads.accounting.operations import (
    adam_direction_flops,
    bm25_flops,
    normalisation_flops,
    projection_flops,
    regression_flops,
    similarity_flops,
    sketch_flops,
    source_policy_flops,
)
from cads.accounting.transformer import read_transformer
from cads.errors import ConfigError
from cads.estimators.enumeration import enumerate_masks
from cads.recipe import TrainConfig
from cads.tasks.language.shapes import LanguageShapes
from cads.tasks.vision.networks import Network
from experiments import flops_overhead
from tests.support.paths import MODELS

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=90),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=3, vocab_size=90, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16, vocab_size=90),
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=90, n_positions=2048),
    "gpt2-no-dropout": GPT2Config(n_embd=48, n_layer=2, n_head=6, vocab_size=90, resid_pdrop=0.0),
    "bert": BertConfig(**SMALL, vocab_size=90),
}
LORAS = {
    "llama": [
        Lora(4, ("q_proj", "v_proj")),
        Lora(4, ("layers.1.mlp.down_proj",), ("lm_head",)),
    ],
    "gpt2": [Lora(4, ("c_proj",)), Lora(4, ("attn.c_proj", "c_fc"))],
    "bert": [Lora(4, ("query", "value")), Lora(4, ("dense",))],
}
LORAS["qwen2"] = LORAS["qwen3"] = LORAS["llama"][:1]
LORAS["gpt2-no-dropout"] = LORAS["gpt2"]


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", FAMILIES)
def test_closed_form_equals_what_is_executed(name, checkpointing):
    config = FAMILIES[name]
    everything = (AllWeights(), Frozen(), *LORAS[name], Lora(4, "all-linear"))
    for trainable in everything if checkpointing is None else (AllWeights(), *LORAS[name][-1:]):
        measured = measure(config, (2, 24), trainable=trainable, checkpointing=checkpointing)
        analytic = transformer_flops(from_config(config), 24, batch=2, trainable=trainable, checkpointing=checkpointing)
        assert analytic == pytest.approx(measured, rel=0.01), trainable


@pytest.mark.parametrize("length", [64, 2048])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_closed_form_holds_for_short_and_long_sequences(name, length):
    lora = LORAS[name][0]
    measured = measure(FAMILIES[name], (1, length), trainable=lora)
    assert transformer_flops(from_config(FAMILIES[name]), length, trainable=lora) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", "classifier"),
        ("qwen3", "none"),
        ("gpt2", "classifier"),
        ("bert", "classifier"),
        ("bert", "none"),
    ],
)
def test_every_head_is_counted(name, head):
    measured = measure(FAMILIES[name], (2, 16), head=head)
    assert transformer_flops(from_config(FAMILIES[name], head), 16, batch=2) == pytest.approx(measured, rel=0.01)


def test_a_head_on_answer_positions_only_costs_less():
    config = FAMILIES["llama"]
    architecture = from_config(config)
    analytic = transformer_flops(architecture, 32, head_positions=5)
    assert analytic == pytest.approx(measure(config, (1, 32), head_positions=5), rel=0.01)
    assert analytic.usage < transformer_flops(architecture, 32).usage


def test_llama_7b_needs_no_weights():
    config = read_config(MODELS / "llama-2-7b.json")
    config.num_hidden_layers = 4
    lora = Lora(128, ("q_proj", "k_proj", "v_proj", "o_proj"))
    measured = measure(config, (1, 2048), trainable=lora)
    assert transformer_flops(from_config(config), 2048, trainable=lora) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_all_accounted_for(name):
    config = FAMILIES[name]
    builder = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = builder.from_config(config)
    assert sum(from_config(config).n_parameters.values()) == sum(p.numel() for p in model.parameters())


@given(length=st.integers(1, 300), batch=st.integers(1, 5), r=st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_laws_of_cost(length, batch, r):
    architecture = from_config(FAMILIES["qwen3"])
    full = transformer_flops(architecture, length, batch=batch)
    frozen = transformer_flops(architecture, length, batch=batch, trainable=Frozen())
    lora = transformer_flops(architecture, length, batch=batch, trainable=Lora(r, ("q_proj", "v_proj")))
    plain, spare, whole = (
        transformer_flops(architecture, length, batch=batch, checkpointing=c).usage
        for c in (None, "non-reentrant", "reentrant")
    )
    assert full.usage == 3 * full.forward
    assert frozen.usage == frozen.forward == full.forward
    assert lora.forward > full.forward
    assert plain < spare < whole <= plain + full.forward
    assert full.usage == batch * transformer_flops(architecture, length).usage


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet18", (3, 64, 64)),
        ("efficientnet_b0", (3, 64, 64)),
        ("mlp", (1, 28, 28)),
        ("cnn", (3, 32, 32)),
        ("resnet8", (3, 32, 32)),
    ],
)
def test_networks_for_images(name, shape):
    def build() -> nn.Module:
        return Network(name).build(shape, 10)

    def last() -> nn.Module:
        model = build().requires_grad_(False)
        list(model.modules())[-1].requires_grad_(True)
        return model

    with torch.device("meta"):
        images, networks = torch.zeros(2, *shape), {build: build(), last: last()}
    for factory, network in networks.items():
        assert module_flops(network, images) == pytest.approx(measure(factory, (2, *shape)), rel=0.01)
    frozen = module_flops(networks[last].requires_grad_(False), images)
    assert frozen.usage == frozen.forward


def test_walking_a_model_leaves_it_as_it_was():
    model = Network("cnn").build((3, 32, 32), 10)
    model.append(nn.BatchNorm1d(10))
    before = {n: x.clone() for n, x in model.state_dict().items()}
    module_flops(model, torch.zeros(2, 3, 32, 32))
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_backward_of_a_grouped_convolution_costs_twice_its_forward(groups):
    convolution = nn.Conv2d(6, 12, 3, groups=groups)
    x = torch.zeros(2, 6, 9, 9, requires_grad=True)
    forward = count_flops(lambda: convolution(x))
    assert count_flops(lambda: convolution(x).sum().backward()) == 3 * forward


def test_attention_on_the_cpu_is_counted():
    b, h, t, d = 2, 3, 16, 8
    q, k, v = (torch.randn(b, h, t, d, requires_grad=True) for _ in range(3))

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    assert count_flops(attend) == 2 * (2 * b * h * t * t * d)
    assert count_flops(lambda: attend().sum().backward()) == 7 * (2 * b * h * t * t * d)


def test_a_transformer_on_the_cpu_executes_its_closed_form():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation="sdpa")
    tokens = torch.zeros(2, 16, dtype=torch.long)
    counted = count_flops(lambda: model(input_ids=tokens).logits.sum().backward())
    analytic = transformer_flops(from_config(FAMILIES["llama"]), 16, batch=2, fused_attention=True)
    assert counted == pytest.approx(analytic.usage, rel=0.01)


def test_self_test_of_attention(monkeypatch):
    assert attention_self_test() == []
    kernel, formula = next(iter(measured_module.cpu_attention_mapping().items()))
    with monkeypatch.context() as patch:
        patch.setitem(flop_registry, kernel, lambda *args, **kwargs: 7)
        changes = attention_self_test()
        assert "now has a formula" in changes[0]
        assert "counts 7 FLOPs" in changes[1]
    monkeypatch.setattr(measured_module, "cpu_attention_mapping", lambda: {kernel: formula})
    assert "runs other kernels" in attention_self_test()[0]


def test_figures_of_the_paper():
    published = {"llama-2-7b": 4.593e18, "llama-2-13b": 8.638e18, "llama-2-70b": 4.926e19}
    n = {name: ccds_parameters(from_config(read_config(MODELS / f"{name}.json"))) for name in published}
    for name, figure in published.items():
        assert training_flops(n[name], CCDS_TOKENS) == pytest.approx(figure, rel=5e-4)
    scorer = n["llama-2-7b"]
    assert selection_flops("ppl", scorer, CCDS_TOKENS) == pytest.approx(1.531e18, rel=5e-4)
    assert selection_flops("ppl", scorer, CCDS_TOKENS) == pytest.approx(forward_flops(scorer, CCDS_TOKENS))
    assert selection_flops("less", scorer, CCDS_TOKENS) == pytest.approx(8.269e18, rel=5e-4)
    assert selection_flops("bm25", scorer, CCDS_TOKENS) == selection_flops("embedding", scorer, 1) == 0


def test_parameters_of_llama_2():
    counts = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
    for size, count in counts.items():
        architecture = from_config(read_config(MODELS / f"llama-2-{size}.json"))
        assert sum(architecture.n_parameters.values()) == count
    lora = Lora(128, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert lora_parameters(from_config(read_config(MODELS / "llama-2-7b.json")), lora) == 134_217_728


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: from_config(MistralConfig()), "falls back to `measured`"),
        (lambda: from_config(FAMILIES["bert"], "lm"), "masked-lm"),
        (lambda: from_config(FAMILIES["gpt2"], "masked-lm"), "gpt2"),
        (lambda: Lora(0, ("q_proj",)), "rank"),
        (lambda: Lora(4, ()), "targets"),
        (lambda: Lora(4, "q_proj"), "targets"),
        (
            lambda: transformer_flops(from_config(FAMILIES["llama"]), 8, trainable=Lora(4, ("c_attn",))),
            "c_attn",
        ),
        (lambda: transformer_flops(from_config(FAMILIES["llama"]), 0), "positive"),
        (lambda: transformer_flops(from_config(FAMILIES["gpt2"]), 2049), "learned positions"),
        (lambda: transformer_flops(from_config(FAMILIES["llama"]), 8, head_positions=9), "head_positions"),
        (lambda: measure(FAMILIES["gpt2"], (1, 2049)), "learned positions"),
        (lambda: measure(FAMILIES["llama"], (4,)), "cannot run"),
        (lambda: measure(FAMILIES["llama"], (1, 8), trainable=Lora(4, ("c_attn",))), "c_attn"),
        (lambda: measure(lambda: nn.Linear(3, 4), (2, 5)), "cannot run"),
        (lambda: measure(lambda: nn.Linear(3, 4), (2, 3), checkpointing="reentrant"), "transformers configs"),
        (lambda: module_flops(nn.Linear(3, 4), torch.zeros(2, 5)), "cannot run"),
        (lambda: module_flops(nn.LSTM(3, 4), torch.zeros(2, 5, 3)), "`measured`"),
        (lambda: read_config(MODELS / "missing.json"), "missing.json"),
        (lambda: read_config(__file__), "JSON"),
        (lambda: training_flops(0, 1e6), "n_parameters"),
        (lambda: selection_flops("magic", 7e9, 1e8), "magic"),
    ],
)
def test_bad_input(attempt, message):
    with pytest.raises(ConfigError, match=message):
        attempt()


def test_an_unknown_architecture_is_measured():
    config = MistralConfig(**SMALL, num_key_value_heads=2, vocab_size=90)
    assert measure(config, (1, 16)) == measure(FAMILIES["llama"], (1, 16))


@pytest.fixture
def language(tmp_path):
    """Makes a language task on the meta device: `language(config, accounting, **settings)`."""

    def make(config, accounting="measured", **settings):
        path = tmp_path / "config.json"
        path.write_text(config.to_json_string())
        settings = {"lora_targets": ["q_proj", "v_proj"], "dtype": "float32", "tokens": 24, "n_pool": 50, **settings}
        task = LanguageShapes(model=str(path), **settings).meta(TrainConfig(batch_size=4))
        task.accounting = accounting
        return task

    return make


def same_costs(one, other, pool):
    assert other.forward_pool(pool) == pytest.approx(one.forward_pool(pool), rel=0.01)
    assert other.per_usage(pool, 4) == pytest.approx(one.per_usage(pool, 4), rel=0.01)
    assert other.optimizer_step == one.optimizer_step
    assert other.tokens_per_example(pool) == one.tokens_per_example(pool)


@pytest.mark.parametrize("kind", ["features", "sentences", "images", "cnn"])
def test_analytic_and_measured_costs_agree_on_small_networks(request, kind):
    task = request.getfixturevalue("images")(model="cnn") if kind == "cnn" else request.getfixturevalue(kind)()
    analytic = Costs(task, "analytic")
    assert analytic.accounting == "analytic"
    same_costs(Costs(task), analytic, task.pool)
    batch = task.pool.batch(np.arange(5))
    assert analytic.usage(batch) == pytest.approx(task.costs.usage(batch), rel=0.01)
    assert analytic.forward(batch) == pytest.approx(task.costs.forward(batch), rel=0.01)


@pytest.mark.parametrize("lora_rank", [None, 4])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
def test_analytic_and_measured_costs_agree_on_transformers(language, lora_rank, checkpointing):
    task = language(FAMILIES["llama"], lora_rank=lora_rank, checkpointing=checkpointing)
    analytic = Costs(task, "analytic")
    assert analytic.accounting == "analytic"
    same_costs(task.costs, analytic, task.pool)


def test_a_real_transformer_is_read_as_it_will_be_executed():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation="sdpa")
    tokens = torch.zeros(1, 16, dtype=torch.long)
    counted = count_flops(lambda: model(input_ids=tokens).logits.sum().backward())
    assert read_transformer(model).flops(16)[1] == pytest.approx(counted, rel=0.01)
    frozen = read_transformer(model.requires_grad_(False))
    assert frozen.flops(16)[1] == frozen.flops(16)[0]


@pytest.mark.parametrize("change", ["architecture", "frozen"])
def test_a_model_without_closed_form_is_measured_and_this_is_said_once(language, caplog, change):
    if change == "architecture":
        task = language(MistralConfig(**SMALL, num_key_value_heads=2, vocab_size=90), lora_rank=None)
    else:
        task = language(FAMILIES["llama"], lora_rank=None)
        whole = task.model(0)
        whole.lm_head.requires_grad_(False)
        task.model = lambda seed: whole
    with caplog.at_level(logging.WARNING):
        costs = Costs(task, "analytic")
        for _ in range(2):
            costs.per_usage(task.pool, 4)
            costs.usage(task.pool.batch([0, 1]))
    assert costs.accounting == "measured"
    assert len(caplog.records) == 1
    assert "falls back to `measured`" in caplog.text
    assert costs.per_usage(task.pool, 4) == Costs(task).per_usage(task.pool, 4)


def test_paper_costs_are_2nd_and_6nd(language, sentences):
    task = language(FAMILIES["llama"], "paper", pool_tokens=500, lora_rank=4)
    n = sum(from_config(FAMILIES["llama"]).n_parameters.values())
    assert task.costs.forward_pool(task.pool) == pytest.approx(2 * n * 500)
    assert task.costs.per_usage(task.pool, 4) == pytest.approx(6 * n * 10)
    assert task.costs.tokens_per_example(task.pool) == pytest.approx(10)
    assert task.costs.optimizer_step == 0
    task = language(FAMILIES["llama"], "paper", paper_context=7)
    context = ccds_parameters(from_config(FAMILIES["llama"]), 7)
    assert task.costs.usage(task.pool.batch([0, 1])) == pytest.approx(6 * context * 2 * 24)
    task = sentences()
    batch = task.pool.batch(np.arange(3))
    n = sum(p.numel() for p in task.model(0).parameters())
    assert Costs(task, "paper").usage(batch) == pytest.approx(6 * n * batch.tokens)


def test_an_accounting_that_is_not_supported_is_refused(images, features):
    with pytest.raises(ConfigError, match="use measured or analytic"):
        Costs(images(), "paper")
    with pytest.raises(ConfigError, match=r"accounting = 'guess'.*measured.*analytic.*paper"):
        Costs(features(), "guess")


def test_adapters_alone_are_updated(language):
    task = language(FAMILIES["llama"], "analytic", lora_rank=4)
    parameters = lora_parameters(from_config(FAMILIES["llama"]), Lora(4, ("q_proj", "v_proj")))
    assert task.costs.optimizer_step == parameters * (ADAMW_FLOPS + CLIP_FLOPS)


class Counting(np.ndarray):
    """An array that counts what is done with it: one FLOP an element, n - 1 for a sum of n."""

    flops = 0
    FREE = ("isnan", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "maximum", "minimum")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [np.asarray(x) if isinstance(x, Counting) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(np.asarray(x) if isinstance(x, Counting) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc.__name__ not in Counting.FREE:
            work = {"expit": 4}.get(ufunc.__name__, 1)
            Counting.flops += work * (np.size(plain[0]) - 1 if method == "reduce" else np.size(result))
        return result.view(Counting) if isinstance(result, np.ndarray) else result


@given(n=st.integers(1, 9), m=st.integers(1, 9), d=st.integers(1, 9), k=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_products_around_the_model_cost_what_they_execute(n, m, d, k):
    x, matrix, queries = torch.ones(n, d), torch.ones(d, k), torch.ones(m, d)
    assert projection_flops(n, d, k) == count_flops(lambda: x @ matrix)
    assert similarity_flops(m, n, d) == count_flops(lambda: queries @ x.T)


def test_work_on_vectors_costs_what_it_executes():
    g, m, v = (np.random.default_rng(i).random((4, 6)).view(Counting) for i in range(3))
    Counting.flops = 0
    g / np.sqrt((g * g).sum(axis=1, keepdims=True))
    assert normalisation_flops(4, 6) == pytest.approx(Counting.flops, rel=0.1)
    Counting.flops = 0
    (0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g * g + 1e-8)
    assert adam_direction_flops(4, 6) == Counting.flops
    Counting.flops = 0
    signs = np.ones(6)
    np.sum(g * signs, axis=0)
    assert sketch_flops(4, 6) == pytest.approx(Counting.flops, rel=0.05)


def test_bm25_costs_what_it_executes():
    texts = [[0, 1, 1, 2], [1, 3], [2, 2, 2, 3, 4]]
    queries = [[1, 2], [3, 3]]
    tf = np.array([[text.count(word) for word in range(5)] for text in texts])
    rows, words = np.nonzero(tf)
    length, mean = np.array([len(text) for text in texts]), 11 / 3
    k1, b = 1.5, 0.75
    norm = k1 * (1 - b + b * length / mean)
    idf, f = np.linspace(1, 2, 5), tf[rows, words].astype(float).view(Counting)
    Counting.flops = 0
    weights = idf[words] * f * (k1 + 1) / (f + norm[rows])
    matches = 0
    scores = np.zeros(3)
    for query in queries:
        for word in query:
            hits = np.flatnonzero(words == word)
            scores[rows[hits]] += weights[hits] / len(queries)
            matches += len(hits)
    exact = Counting.flops + matches
    assert exact <= bm25_flops(len(f), matches)
    assert bm25_flops(len(f), matches) == pytest.approx(Counting.flops + 2 * matches, abs=4 * len(f))


@given(sources=st.integers(1, 12), runs=st.integers(0, 40), steps=st.integers(0, 60))
def test_learning_a_policy_over_sources_costs_more_with_more_of_anything(sources, runs, steps):
    features = sources + sources * (sources - 1) // 2 + 1
    drawn = len(enumerate_masks(sources)) - 1
    least = source_policy_flops(sources, features, drawn, runs, steps)
    assert least >= regression_flops(runs, features) >= 0
    assert least <= source_policy_flops(sources, features, drawn, runs + 1, steps)
    assert least <= source_policy_flops(sources, features, drawn, runs, steps + 1)
    with pytest.raises(ConfigError, match="n_runs"):
        source_policy_flops(sources, features, drawn, -1, steps)


def test_the_overhead_of_counting_is_reported(tmp_path):
    said = []
    flops_overhead.main(["--out", str(tmp_path / "overhead.md"), "--steps", "20"], said.append)
    assert "largest share" in said[0]
    assert "| CNN | 64 |" in (tmp_path / "overhead.md").read_text()
