"""Costs neither hold nor move the weights of models, and are those of the models with weights."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from cads.accounting.costs import ACCOUNTINGS, Costs
from cads.accounting.hollow import hollow
from tests.support.language_tasks import LORA


def storages(model):
    return {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("accounting", list(ACCOUNTINGS))
def test_costs_share_nothing_with_models_of_the_task(build, accounting, peft):
    task = build(peft=peft)
    costs, trained = Costs(task, accounting), task.model(1)
    assert not storages(costs.model) & (storages(trained) | storages(task.models.base))
    # Parameters have no memory: one number each.
    assert all(p.untyped_storage().nbytes() <= 8 for p in costs.model.parameters())
    assert [(p.shape, p.dtype, p.requires_grad) for p in costs.model.parameters()] == [
        (p.shape, p.dtype, p.requires_grad) for p in task.model(0).parameters()
    ]


def test_what_moves_trained_models_moves_no_costs(build):
    """Moved as to another device, in place: all models on one frozen base move together."""
    batch = build().pool.batch(np.arange(4))
    expected = build(peft=LORA).costs.usage(batch)
    task = build(peft=LORA)
    assert task.costs.usage(batch) == expected
    task.model(0).to(torch.bfloat16)
    assert {p.dtype for p in task.models.base.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in task.costs.model.parameters()} == {torch.float32}
    longer = task.pool.batch(np.array([int(task.pool.examples.lengths().argmax())]))
    assert task.costs.usage(longer) == build(peft=LORA).costs.usage(longer)
    before = [p.dtype for p in task.models.base.parameters()]
    task.costs.model.to(torch.float16)
    assert [p.dtype for p in task.models.base.parameters()] == before


@pytest.mark.parametrize("kind", ["features", "sentences", "images", "texts"])
def test_a_model_without_weights_costs_as_much(request, kind):
    """To the FLOP, in every accounting that counts what is executed."""
    # The model of the texts is called in pieces, which has no closed form.
    check(request.getfixturevalue(kind)(), ("measured",) if kind == "texts" else ("measured", "analytic"))


@pytest.mark.parametrize("options", [{}, {"peft": LORA}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_language_model_without_weights_costs_as_much(build, family, options):
    if family == "gpt2" and "peft" in options:
        options = {"peft": {**LORA, "target_modules": ["c_attn"]}}
    check(build(family=family, **options))


def check(task, accountings=("measured", "analytic")):
    for name in accountings:
        lean, full = ACCOUNTINGS[name](task), ACCOUNTINGS[name](task)
        full.__dict__["model"] = task.model(0)
        for rows in (np.array([0]), np.arange(3)):
            assert lean.price(task.pool.batch(rows)) == full.price(task.pool.batch(rows))
        assert lean.optimizer_step == full.optimizer_step


def test_buffers_are_copied_and_shared_weights_stay_shared():
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = inner.weight
    running = model[1].running_mean
    shell = hollow(model)
    assert shell[2].weight is shell[0].weight
    assert shell[1].running_mean is not running
    shell.train()(torch.ones(3, 4))
    assert torch.equal(running, torch.zeros(4))
    assert inner.weight.any()


def test_a_backbone_that_all_models_share_keeps_its_weights():
    backbone = nn.Linear(4, 4)
    before = backbone.weight.clone()
    hollow(nn.Sequential(backbone, nn.Linear(4, 2)))
    assert torch.equal(backbone.weight, before)


def test_a_model_that_cannot_be_copied_is_counted_as_it_is(caplog):
    model = nn.Linear(2, 2)
    model.held = (x for x in range(2))
    assert hollow(model) is model
    assert "cannot be copied" in caplog.text


def test_meta_models_stay_there():
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**5)
    assert hollow(model).weight.device.type == "meta"


def test_the_model_that_was_made_for_costs_is_gone(features):
    task, models = copy.copy(features()), []
    model = task.model

    def watched(seed):
        models.append(weakref.ref(built := model(seed)))
        return built

    task.model = watched
    costs = Costs(task)
    assert costs.usage(task.pool.batch(np.arange(2))) > 0
    gc.collect()
    assert len(models) == 1
    assert models[0]() is None
