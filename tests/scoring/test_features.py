"""What an amortised policy sees of examples, free or read, and the order in which it visits them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cads.accounting.ledger import SELECT, Ledger
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError
from cads.scoring.features import (
    ENTROPY,
    GROUP,
    LENGTH,
    LOSS,
    MARGIN,
    SOURCE,
    FreeFeatures,
    ReadFeatures,
    _CachedForward,
)
from cads.selectors.cads_amortised.policy import AmortisedPolicy
from cads.selectors.cads_amortised.sample import visit_order
from cads.selectors.cads_amortised.selector import probabilities_of
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource
from tests.support.noisy_digits import RECIPE, SOURCES, without_sources


class TestFeatures:
    def test_free_columns_are_what_they_say(self, noisy, texts):
        free = FreeFeatures(noisy, noisy.pool)
        assert [n for n in free.names if not n.startswith(GROUP)] == [SOURCE + s.name for s in SOURCES]
        assert sum(n.startswith(GROUP) for n in free.names) == 10
        positions = np.array([5, 900, 3])
        columns = free.values([*free.names, SOURCE + "unknown"], positions)
        labels = noisy.groups(noisy.pool)[positions]
        for row, position, label in zip(columns, positions, labels, strict=True):
            on = {n for n, x in zip([*free.names, "?"], row, strict=True) if x}
            assert on == {SOURCE + SOURCES[noisy.pool.sources[position]].name, f"{GROUP}{label}"}
        task = texts()
        assert FreeFeatures(task, task.pool, ["length"]).names == [LENGTH]
        known = FreeFeatures(task, task.pool).values([LENGTH], positions[[0, 2]])[:, 0]
        np.testing.assert_allclose(np.exp(known), task.pool.examples.lengths()[positions[[0, 2]]])

    def test_read_columns_are_what_they_say_in_one_forward_pass(self, noisy):
        model, calls = noisy.model(0).eval(), []
        model.register_forward_hook(lambda *_: calls.append(1))
        ledger, positions = Ledger(), np.array([700, 3, 40, 41])
        read = ReadFeatures(noisy, model, "cpu")
        assert read.names == [LOSS, ENTROPY, MARGIN]
        columns = read.of(noisy.pool, positions, ledger=ledger, stage="R")
        assert len(calls) == 1
        batch = noisy.pool.batch(positions)
        assert ledger.entries[SELECT, "R"].flops == noisy.costs.forward(batch)
        with torch.no_grad():
            p = torch.softmax(noisy.logits(model, batch).double(), dim=1).numpy()
        own = p[np.arange(4), batch.labels]
        rest = np.where(np.eye(10)[batch.labels] > 0, 0, p).max(axis=1)
        expected = np.column_stack([-np.log(own), -(p * np.log(p)).sum(axis=1), np.log(own) - np.log(rest)])
        np.testing.assert_allclose(columns, expected, rtol=1e-5, atol=1e-5)

    def test_what_is_not_there_is_refused_and_not_zero(self, noisy):
        free = FreeFeatures(noisy, noisy.pool)
        for name in (LOSS, LENGTH, "colour"):
            with pytest.raises(ConfigError, match=f"'{name}' is not free"):
                free.values([name], np.arange(3))
        assert not free.values([f"{GROUP}other", f"{GROUP}77"], np.arange(3)).any()
        read = ReadFeatures(noisy, noisy.model(0), "cpu", ["loss"])
        policy = AmortisedPolicy((ENTROPY,), np.zeros(1), np.ones(1), np.ones(1), 0.0)
        with pytest.raises(ConfigError, match="read what it was learned on"):
            probabilities_of(policy, noisy, noisy.pool, np.arange(3), read=read, ledger=Ledger())
        for kind in (read, None):
            assert not len(probabilities_of(policy, noisy, noisy.pool, np.arange(0), read=kind, ledger=Ledger()))

    def test_a_model_called_by_name_is_called_once_too(self):
        class Doubled(torch.nn.Module):
            calls = 0

            def forward(self, x, *, scale, mask=None):
                self.calls += 1
                return scale * x

        model = Doubled()
        once, x = _CachedForward(model), torch.arange(4.0)
        first = once(x, scale=2.0, mask={"a": [x]})
        assert once(x.clone(), mask={"a": [x.clone()]}, scale=2.0) is first
        for inputs, options in (
            ((x,), {"scale": 3.0}),
            ((x,), {"scale": 3.0, "mask": {"a": [x]}}),
            ((x,), {"scale": 3.0, "mask": {"a": [x + 1]}}),
            ((x.double(),), {"scale": 3.0, "mask": {"a": [x + 1]}}),
        ):
            before = model.calls
            assert torch.equal(once(*inputs, **options), model(*inputs, **options))
            assert model.calls == before + 2

    def test_losses_that_are_not_finite_are_named(self, noisy):
        model = noisy.model(0)
        with torch.no_grad():
            next(iter(model.parameters())).fill_(torch.nan)
        with pytest.raises(DataError, match=f"such as.*{noisy.pool.ids[3].as_py()}.*are not finite"):
            ReadFeatures(noisy, model, "cpu").of(noisy.pool, np.array([3]), ledger=Ledger(), stage="R")

    def test_a_single_class_has_no_margin(self, noisy, monkeypatch):
        monkeypatch.setattr(type(noisy), "logits", lambda self, model, batch: torch.ones(len(batch), 1))
        task = copy.copy(noisy)
        task.pool = noisy.pool.subset(np.flatnonzero(noisy.pool.examples.labels.numpy() == 0), "pool")
        read = ReadFeatures(task, task.model(0), "cpu", ["confidence"])
        assert not read.of(task.pool, np.arange(4), ledger=Ledger(), stage="R").any()

    def test_a_task_without_classes_has_its_loss(self, texts):
        task = texts()
        read = ReadFeatures(task, task.model(0), "cpu")
        assert read.names == [LOSS]
        got = read.of(task.pool, np.arange(80), ledger=Ledger(), stage="R")[:, 0]
        with torch.no_grad():
            one = task.losses(task.model(0), task.pool.batch(np.array([7]))).item()
        assert got[7] == pytest.approx(one, rel=1e-5)


class TestVisit:
    @pytest.mark.parametrize("sources", [True, False])
    def test_a_permutation_of_the_pool_does_not_change_it(self, noisy, sources):
        pool = noisy.pool if sources else without_sources(noisy).pool
        shuffle = np.random.default_rng(1).permutation(len(pool))
        codes = None if pool.sources is None else pool.sources[shuffle]
        other = Pool(pool.ids.take(shuffle), pool.examples.take(shuffle), codes, pool.source_names)
        before, after = visit_order(pool, 3), visit_order(other, 3)
        assert sorted(before) == list(range(len(pool)))
        assert pool.ids.take(before).equals(other.ids.take(after))
        assert not np.array_equal(before, visit_order(pool, 4))

    def test_any_beginning_holds_each_source_in_proportion(self, noisy):
        order, pool = visit_order(noisy.pool, 0), noisy.pool
        for share in (0.05, 0.3, 0.77):
            seen = np.bincount(pool.sources[order[: round(share * len(pool))]], minlength=3)
            assert np.abs(seen - share * pool.source_sizes).max() <= 2

    def test_copies_stand_together(self):
        sources = [SyntheticSource("once", size=60), SyntheticSource("copied", size=60, duplicates=4)]
        pool = VisionConfig(n_pool=200, n_target=20, n_test=20, sources=sources).build(RECIPE).pool
        for source in (0, 1):
            order = [i for i in visit_order(pool, 0) if pool.sources[i] == source]
            codes = pool.content_codes[order]
            assert (np.diff(codes) != 0).sum() + 1 == len(np.unique(codes))
