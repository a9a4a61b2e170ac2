"""`cads plan`: it spends nothing, it says what will be spent, and CCDS's figures come out of it."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from cads import api
from cads.accounting.architectures import from_config
from cads.accounting.budget import Budget
from cads.accounting.closed_form import AllWeights, Lora
from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.measured import build_transformer
from cads.accounting.throughput import matmul_flops_per_second
from cads.accounting.units import duration, size
from cads.cli.main import main
from cads.errors import BudgetError, ConfigError, DataError
from cads.monitor import Monitor
from cads.planning import timing
from cads.planning.ccds import PUBLISHED
from cads.planning.memory import layer_values, training_memory
from cads.planning.methods import make_plan
from cads.planning.plan import recommendation
from cads.recipe import TrainConfig
from cads.registry import SELECTORS, build_selector, names
from cads.runtime import process_usage
from cads.scoring.ranker import Ranker
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from cads.tasks.language.shapes import LanguageShapes
from cads.tasks.shape_only import Field, ShapeOnly, shape_only_pool
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from cads.training.final import train
from cads.training.trainer import Trainer
from tests.support.paths import MODELS, ROOT
from tests.support.tiny_llama import model_folder, sums, write_lines

NEEDED = {"source": {"name": "clean"}}
TEXT_ONLY = ("bm25",)
RECIPE = TrainConfig(batch_size=8)
SOURCES = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9), SyntheticSource("small", size=20)]
DIGITS = VisionConfig(hidden=16, n_pool=80, n_target=40, n_test=30, sources=SOURCES)
LLAMA = {"selector_model": str(MODELS / "llama-2-7b.json"), "pool_tokens": 98.0e6, "paper_context": 4096}
LINE = 80


@pytest.fixture(scope="module")
def digits():
    return DIGITS.build(RECIPE)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The config of a small Llama."""
    path = tmp_path_factory.mktemp("models") / "small.json"
    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80, vocab_size=90
    )
    path.write_text(config.to_json_string())
    return str(path)


@pytest.fixture
def cads(capsys):
    """Runs a command in this process; returns exit status, stdout and stderr (words divided by single spaces)."""

    def run(*argv):
        try:
            status = main([str(word) for word in argv])
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return run


def stages(ledger):
    return {stage: entry.flops for (phase, stage), entry in ledger.entries.items() if phase == SELECT}


BUDGETS = [Budget(16, "epochs"), Budget(24, "epochs", count_selection=True), Budget(3, "epochs", count_selection=True)]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", names(SELECTORS))
def test_what_is_planned_is_what_is_charged(digits, texts, name, budget):
    selector, ledger = build_selector(name, NEEDED.get(name)), Ledger()
    task = texts(batch_size=8) if name in TEXT_ONLY else digits
    planned = selector.plan(task, budget)
    # Words are counted, so a pool without contents gives no more than a bound.
    planned_on_meta = planned if name in TEXT_ONLY else selector.plan(DIGITS.meta(RECIPE), budget)
    if isinstance(selector, Ranker) and budget.count_selection and planned.total().flops >= budget.flops(task):
        with pytest.raises(BudgetError, match="nothing is left to train with"):
            selector.select(task, budget, seed=0, ledger=ledger)
        assert not ledger.entries
        return
    selector.select(task, budget, seed=0, ledger=ledger)
    spent = ledger.total(SELECT)
    assert planned.total().flops == pytest.approx(spent.flops, rel=0.01)
    assert planned_on_meta.total().flops == pytest.approx(spent.flops, rel=0.01)
    assert stages(planned) == pytest.approx({k: v for k, v in stages(ledger).items() if v}, rel=0.02)
    assert planned.total().usages == pytest.approx(spent.usages, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        DIGITS,
        VisionConfig(),
        VisionConfig(
            n_pool=100,
            model="cnn",
            image_size=16,
            sources=[SyntheticSource("a", size=30), SyntheticSource("b", size=9)],
        ),
    ],
)
def test_a_meta_task_costs_what_the_task_costs(config):
    meta, task = config.meta(RECIPE), config.build(RECIPE)
    for part in ("pool", "target", "test"):
        mine, its = getattr(meta, part), getattr(task, part)
        assert len(mine) == len(its)
        assert meta.costs.forward_pool(mine) == task.costs.forward_pool(its)
        assert meta.costs.per_usage(mine, 8) == task.costs.per_usage(its, 8)
    if config.sources:
        assert meta.pool.source_names == task.pool.source_names
        assert abs(meta.pool.source_sizes - task.pool.source_sizes).max() <= 1


@pytest.mark.parametrize(
    ("n", "shape", "sources", "message"),
    [
        (0, (3,), None, "0 examples"),
        (-2, (3,), None, "-2 examples"),
        (4, (3, 0), None, r"inputs of shape .*\(3, 0\)"),
        (4, (3,), {"a": 5, "b": -1}, "source 'b' has size -1"),
    ],
)
def test_shapes_without_examples_are_refused(n, shape, sources, message):
    with pytest.raises(ConfigError, match=message):
        shape_only_pool("pool", ShapeOnly(n, {"x": Field(shape)}, Field(())), sources)


def test_a_meta_task_has_no_weights_and_no_data():
    meta = VisionConfig(dataset="cifar10", model="resnet18", pretrained=True, n_pool=1000).meta(RECIPE)
    assert all(p.is_meta for p in meta.model(0).parameters())
    assert meta.pool.batch([0, 1]).inputs["images"].is_meta
    with pytest.raises(DataError, match="no examples"):
        meta.pool.examples.digests()
    assert len(VisionConfig(dataset="fashion-mnist").meta(RECIPE).pool) == 54_000


def test_planning_trains_nothing(monkeypatch, cads):
    def never(*args, **options):
        raise AssertionError("a plan must not train")

    monkeypatch.setattr(Trainer, "_run", never)
    monkeypatch.setattr(VisionConfig, "build", never)
    status, out, _ = cads("plan", "--flops_per_second", 1e12, "--budget", "16 epochs")
    assert status == 0
    assert "search" in out


def test_a_selector_that_cannot_fit_says_so_and_spends_nothing(digits, caplog):
    selector, ledger = build_selector("search"), Ledger()
    budget = Budget(0.3, "epochs", count_selection=True)
    assert "full pool" in selector.plan(digits, budget).note
    with caplog.at_level(logging.WARNING):
        chosen = selector.select(digits, budget, seed=0, ledger=ledger)
    assert "search" in caplog.text
    assert "allowance buys no" in caplog.text
    assert ledger.total().flops == 0
    assert chosen.selected.all()


FIGURES = {"7b": (4.593e18, False, False), "13b": (8.638e18, False, False), "70b": (4.926e19, True, True)}


@pytest.mark.parametrize("model", FIGURES)
def test_the_figures_of_ccds(cads, tmp_path, monkeypatch, model):
    monkeypatch.chdir(ROOT)
    file = f"experiments/configs/plan-llama-2-{model}.yaml"
    methods = "[full, bm25, embedding, ppl, less]"
    out = tmp_path / "plan.json"
    status, text, _ = cads(
        "plan", file, "--accounting", "paper", "--json", out, "--flops_per_second", 1e15, "--methods", methods
    )
    assert status == 0
    assert max(map(len, text.splitlines())) <= LINE
    assert "the pool has 9.8e+07 tokens" in text
    plan = json.loads(out.read_text())
    rows = {row["method"]: row for row in plan["methods"]}
    training, ppl, less = FIGURES[model]
    assert plan["accounting"] == "paper"
    assert (plan["pool"], plan["pool_tokens"]) == (270_679, pytest.approx(98.0e6))
    assert rows["full"]["training"] == pytest.approx(training, rel=1e-3)
    assert rows["ppl"]["selection"] == pytest.approx(1.531e18, rel=1e-3)
    assert rows["less"]["selection"] == pytest.approx(8.269e18, rel=1e-3)
    assert rows["bm25"]["selection"] == rows["embedding"]["selection"] == 0
    assert (rows["ppl"]["in_range"], rows["less"]["in_range"]) == (ppl, less)
    assert (rows["ppl"]["needed_ratio"], rows["less"]["needed_ratio"]) == (5, 10)
    assert "ICLR 2025" in plan["ratio_source"]
    assert rows["less"]["seconds"] == pytest.approx((rows["less"]["selection"] + plan["flops"]) / 1e15)


def test_all_methods_are_planned_for_a_large_model():
    sources = {"flan_v2": 100_000, "cot": 100_000, "dolly": 15_011, "oasst1": 55_668}
    settings = LanguageShapes(
        model=str(MODELS / "llama-2-7b.json"), embedding_model=str(MODELS / "bert-base.json"), sources=sources, **LLAMA
    )
    task = settings.meta(TrainConfig(batch_size=128, accumulate=128, precision="bf16"))
    task.accounting = "analytic"
    methods = {"search": build_selector("search"), **PUBLISHED}
    plan = make_plan(task, Budget(1, "epochs"), methods, flops_per_second=1e15, strict=True)
    rows = {row.method: row for row in plan.methods}
    assert rows["less"].selection > rows["ppl"].selection > rows["embedding"].selection > rows["bm25"].selection > 0
    assert rows["less"].epochs == pytest.approx(1)
    assert rows["less"].examples == pytest.approx(270_679)
    assert rows["less"].tokens == pytest.approx(270_679 * 2048)
    weights = 2 * (6_738_415_616 + 134_217_728)
    assert rows["less"].memory["training"] > weights
    assert rows["search"].memory["selection"] > rows["search"].memory["training"]
    for row in rows.values():
        assert sum(row.stages.values()) == pytest.approx(row.selection)


def test_a_budget_for_both_is_shared(small):
    task = LanguageShapes(model=small, lora_targets=["q_proj"], tokens=16, n_pool=100).meta(RECIPE)
    task.accounting = "analytic"
    methods = {"ppl": PUBLISHED["ppl"], "less": PUBLISHED["less"]}
    alone, counted = (
        make_plan(task, Budget(1, "epochs", count_selection=c), methods, flops_per_second=1e9) for c in (False, True)
    )
    for one, both in zip(alone.methods, counted.methods, strict=True):
        assert one.training == alone.flops
        assert both.training == pytest.approx(max(0.0, counted.flops - both.selection))
        assert one.share == both.share == pytest.approx(one.selection / alone.flops)
    assert "does not fit" in counted.methods[1].note
    assert "does not fit" not in alone.methods[1].note


def test_methods_without_a_plan_say_why(small):
    task = LanguageShapes(model=small, lora_targets=["q_proj"], tokens=16, n_pool=100).meta(RECIPE)
    methods = {"search": build_selector("search"), **PUBLISHED}
    plan = make_plan(task, Budget(1, "epochs"), methods, flops_per_second=1e9)
    assert [row.method for row in plan.methods] == ["ppl", "less"]
    assert "no sources" in plan.refused["search"]
    assert "analytic or paper" in plan.refused["bm25"]
    assert "embedding_model" in plan.refused["embedding"]
    with pytest.raises(ConfigError, match="analytic or paper"):
        make_plan(task, Budget(1, "epochs"), {"bm25": PUBLISHED["bm25"]}, flops_per_second=1e9, strict=True)
    with pytest.raises(ConfigError, match="scores texts"):
        PUBLISHED["ppl"].plan(DIGITS.meta(RECIPE), Budget(1, "epochs"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=-1 epochs"], "positive"),
        (["--budget", "0"], "positive"),
        (["--budget", "5 parsecs"], "does not parse"),
        (["--budget", "1 usages"], "does not buy one step"),
        (["--flops_per_second", "0"], "flops_per_second = 0"),
        (["--accounting", "paper"], "use measured or analytic"),
        (["--methods", "[bm25]"], "has no text"),
        (["--methods", "[magic]"], "magic"),
        (["--kind", "lm-shapes"], "--task.model"),
        (["--kind", "lm-shapes", "--task.model", "missing.json"], "missing.json"),
        (["--kind", "lm-shapes", "--task.n_pool", "0"], "n_pool = 0"),
        (["--kind", "lm-shapes", "--task.lora_rank", "-1"], "lora_rank = -1"),
        (["--kind", "lm-shapes", "--task.sources", "{a: 3}"], "equal"),
    ],
)
def test_bad_input_is_refused_with_a_reason(cads, flags, message):
    status, _, err = cads("plan", "--flops_per_second", 1e12, *flags)
    assert status == 1
    assert message in err


def test_a_length_or_an_adapter_that_cannot_run_is_refused(tmp_path):
    path = tmp_path / "gpt2.json"
    path.write_text(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50, n_positions=8).to_json_string())
    with pytest.raises(ConfigError, match="8 learned positions"):
        LanguageShapes(model=str(path), lora_targets=["c_attn"], tokens=9).meta(RECIPE)
    task = LanguageShapes(model=str(path), lora_targets=["q_proj"], tokens=8, n_pool=20).meta(RECIPE)
    with pytest.raises(ConfigError, match="q_proj"):
        task.costs.per_usage(task.pool, 8)


def test_a_task_of_shapes_is_only_planned_for(cads, small):
    status, _, err = cads("select", "--kind", "lm-shapes", "--task.model", small, "--method", "full")
    assert status == 1
    assert "cads plan" in err
    task = LanguageShapes(model=small).meta(RECIPE)
    with pytest.raises(ConfigError, match="cads plan"):
        task.metrics(nn.Linear(1, 1), task.pool)


@pytest.mark.parametrize("trainable", [AllWeights(), Lora(8, ("q_proj", "k_proj", "v_proj", "o_proj"))])
def test_activations_in_closed_form_are_what_is_kept(trainable):
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=8, intermediate_size=300, vocab_size=90
    )
    length, kept = 256, {}
    with torch.device("meta"):
        model = build_transformer(config, trainable, None, "lm").train()
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(x):
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (x, storage.nbytes())
            return x

        tokens = torch.zeros(1, length, dtype=torch.long)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits = model(input_ids=tokens, attention_mask=mask).logits
    assert logits.requires_grad
    architecture = from_config(config)
    form = 4 * architecture.layers * layer_values(architecture, length)
    assert form == pytest.approx(sum(n for _, n in kept.values()), rel=0.15)


def test_memory_of_a_small_network_is_counted(features):
    task = features(hidden=8, batch_size=10)
    parameters = sum(p.numel() for p in task.model(0).parameters())
    memory = training_memory(task)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert memory.activations == 10 * 4 * (8 + 8 + 3)
    batched, looped = training_memory(task, 5), training_memory(features(hidden=8, batch_size=10, replicas="loop"), 5)
    assert batched.total == pytest.approx(5 * memory.total + 5 * memory.weights)
    assert looped.total == pytest.approx(memory.total + 4 * memory.weights)
    assert training_memory(features(hidden=8, batch_size=10, accumulate=5)).activations == memory.activations / 5


def test_the_speed_of_products_is_measured_once():
    first = matmul_flops_per_second("cpu", "no")
    assert first > 1e8
    assert matmul_flops_per_second("cpu", "no") == first


class Recorder(Monitor):
    """Keeps scalars."""

    def __init__(self):
        super().__init__()
        self.scalars = {}

    def scalar(self, tag, value, step):
        self.scalars[tag] = value


def test_utilisation_is_logged_and_at_most_one(digits):
    recorder = Recorder()
    full = build_selector("full").select(digits, Budget(2, "epochs"), seed=0, ledger=Ledger())
    outcome = train(digits, full, Budget(2, "epochs"), seed=0, monitor=recorder)
    assert 0 < outcome.utilisation <= 1
    assert recorder.scalars["trainer/mfu"] == outcome.utilisation
    limit = matmul_flops_per_second(str(next(outcome.model.parameters()).device), "no")
    assert outcome.utilisation == pytest.approx(outcome.train_result.flops[-1] / outcome.train_result.seconds / limit)
    assert recorder.scalars["flops/train/final model"] == outcome.ledger.total("train").flops


def test_utilisation_is_printed(cads, tmp_path):
    flags = ["--task.n_pool", 60, "--task.n_target", 20, "--task.n_test", 20, "--budget", "2 epochs"]
    assert cads("select", *flags, "--method", "full", "--out", tmp_path)[0] == 0
    status, out, _ = cads("train", *flags, "--method", "full", "--selection", tmp_path / "selection")
    assert status == 0
    assert "Model FLOP utilisation" in out


def test_numbers_are_short():
    assert [duration(s) for s in (3, 90, 7200, 2 * 86_400, 3e8)] == ["3 s", "1.5 min", "2 h", "2 d", "9.51 y"]
    assert [size(b) for b in (12, 3.4e9, 2e15)] == ["12 B", "3.4 GB", "2e+03 TB"]


def test_a_budget_too_small_for_a_step_buys_no_plan(digits):
    for name in names(SELECTORS):
        with pytest.raises(BudgetError, match="does not buy one step"):
            build_selector(name, NEEDED.get(name)).plan(digits, Budget(7, "usages"))


def test_a_budget_of_time_needs_no_speed_where_steps_can_be_timed(features, small):
    task = features()
    timed = api.plan(task, "2 minutes", method="full")
    assert timed.rate_from == "of steps timed here"
    assert timed.flops == pytest.approx(118 * timed.flops_per_second, rel=1e-6)
    given = api.plan(task, "2 minutes", method="full", flops_per_second=1e6)
    assert given.flops == 120e6
    shapes = LanguageShapes(model=small, tokens=16, n_pool=100).meta(RECIPE)
    with pytest.raises(BudgetError, match="such as --flops_per_second 1e12; or a budget in FLOPs"):
        api.plan(shapes, "2 minutes", method="less")


SOURCES_YAML = "[{name: a, size: 300}, {name: b, size: 300, label_noise: 0.9}]"
NAMES = ["all", "no sources", "few", "target alone", "large budget", "counted"]
SCREENS = [
    (["--budget", "3 epochs", "--task.sources", SOURCES_YAML], "A search would take 162% of it on top."),
    (["--budget", "3 epochs"], "Nothing can be searched: the pool has no sources."),
    (
        ["--budget", "3 epochs", "--task.sources", SOURCES_YAML, "--task.n_target", "10"],
        "`search`: the target has 10 examples, and with fewer than 20 the guard cannot tell",
    ),
    (["--budget", "0.1 epochs"], "At 0.1 epochs: `cads`; the budget buys the target alone."),
    (["--budget", "16 epochs"], "the budget pays for the whole pool, so that what is scored changes nothing"),
    (["--budget", "16 epochs", "--count_selection", "true", "--task.sources", SOURCES_YAML], "% of it."),
]


@pytest.mark.parametrize(("flags", "words"), SCREENS, ids=NAMES)
def test_a_plan_fits_on_a_screen_and_says_what_to_use(cads, flags, words):
    status, text, _ = cads("plan", "--flops_per_second", 1e10, *flags)
    lines = text.splitlines()
    assert status == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= LINE
    flat = " ".join(text.split())
    assert words in flat
    assert "`cads`; " in flat
    assert "more methods" in flat


def test_details_are_behind_a_flag(cads):
    status, details, _ = cads("plan", "--flops_per_second", 1e10, "--details", "true")
    assert status == 0
    assert "Selection by stage, FLOPs" in details
    assert "bm25 has no plan: vision/digits has no text" in " ".join(details.split())
    assert max(map(len, details.splitlines())) <= LINE


@pytest.mark.parametrize("options", [{}, {"fraction": 0.3}, {"target_fraction": 0.25}, {"target_fraction": "by size"}])
@pytest.mark.parametrize("passes", [1, 3, 16])
def test_what_is_kept_is_planned(digits, options, passes):
    budget = Budget(passes, "epochs")
    for name in ("random", "full", "joint", "target-only"):
        selector = build_selector(name, options if name == "random" else None)
        kept = int(selector.select(digits, budget, seed=0, ledger=Ledger()).selected.sum())
        assert selector.plan(digits, budget).kept == pytest.approx(kept, abs=0.03 * len(digits.pool))


def test_times_and_memory_are_those_of_a_process(cads, tmp_path):
    out = tmp_path / "plan.json"
    started = time.monotonic()
    status, text, _ = cads("plan", "--budget", "2 epochs", "--methods", "[full, cads]", "--json", out)
    assert status == 0
    assert "of steps timed here" in text
    assert "start-up, reading, test" in text
    plan = json.loads(out.read_text())
    full, online = plan["methods"]
    assert full["seconds"] == pytest.approx(plan["start_up"] + full["training"] / plan["flops_per_second"])
    assert online["seconds"] > plan["start_up"]
    # The age of this process is that of its start.
    assert process_usage.age() > plan["start_up"] - (time.monotonic() - started)
    assert 0.2 * process_usage.memory() < full["memory"]["training"] <= process_usage.peak_memory() + 1e6
    assert online["memory"]["training"] > full["memory"]["training"]


def test_training_that_does_not_fit_or_lasts_is_not_timed(features, monkeypatch):
    monkeypatch.setattr(timing, "free_memory", lambda: 1000)
    assert "are free here" in api.plan(features(), "2 epochs", method="full").rate_from
    monkeypatch.undo()
    monkeypatch.setattr(timing, "matmul_flops_per_second", lambda *_: 1e-3)
    assert "s or more" in api.plan(features(), "2 epochs", method="full").rate_from


def test_a_language_model_is_timed_without_its_weights(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in sums(60)]
    pool = [TextSource(path=str(write_lines(tmp_path / "a.jsonl", rows)))]
    for peft in (None, {"type": "lora", "r": 2, "target_modules": ["q_proj"]}):
        task = LanguageConfig(model=str(folder), pool=pool, peft=peft).meta(RECIPE)
        plan = api.plan(task, "2 epochs", method="full")
        assert plan.rate_from == "of steps timed here"


def test_an_end_before_the_budget_is_said(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"these are no weights")
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in sums(60)]
    pool = [TextSource(path=str(write_lines(tmp_path / "a.jsonl", rows)))]
    task = LanguageConfig(model=str(folder), pool=pool).meta(RECIPE)
    planned = {}
    for passes in (2, 100):
        plan = api.plan(task, f"{passes} epochs", method=["cads", "full"], flops_per_second=1e10)
        planned[passes] = {m.method: m for m in plan.methods}
        assert ("ends at" in recommendation(plan)) == (passes == 100)
    assert planned[2]["cads"].epochs == pytest.approx(2)
    assert planned[100]["cads"].epochs < 12
    assert planned[100]["full"].epochs == pytest.approx(100)


def test_memory_is_that_of_the_longest_examples(tmp_path):
    folder = model_folder(tmp_path / "model")
    rows = sorted(sums(60), key=lambda row: len(row["prompt"]))
    totals = []
    for n, part in enumerate((rows, rows[::-1], rows[:20])):
        lines = [{"prompt": row["prompt"], "response": row["response"]} for row in part]
        held_out = [{"prompt": f"{x}", "response": "a"} for x in range(4)]
        paths = [write_lines(tmp_path / f"{name}{n}.jsonl", x) for name, x in (("pool", lines), ("target", held_out))]
        pool, target = ([TextSource(path=str(path))] for path in paths)
        task = LanguageConfig(model=str(folder), pool=pool, target=target).meta(RECIPE)
        totals.append(training_memory(task).total)
    assert totals[0] == totals[1] > totals[2]
