"""The warm-up of LESS: its checkpoints and moments, what it costs, and one that is killed and gone on with."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from baselines.gradients.adam_direction import AdamDirection
from baselines.gradients.features import GradientFeatures
from baselines.gradients.warmup import Checkpoint, schedule, warm_up, warmup_flops
from baselines.less import Less
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import BudgetError, CheckpointError
from cads.runtime.checkpoint import CheckpointConfig
from tests.support.killed_runs import resumed
from tests.support.plain_less import rank


class TestWarmUp:
    def test_one_checkpoint_an_epoch_with_moments_by_name(self, task):
        plan = schedule(task, 0.5, 4)
        assert (plan.examples, plan.steps) == (30, 4)
        ledger = Ledger()
        actual = warm_up(task, plan, seed=0, ledger=ledger)
        assert [c.steps for c in actual] == [4, 8, 12, 16]
        names = set(dict(task.model(0).named_parameters()))
        for c in actual:
            assert set(c.parameters) == set(c.first) == set(c.second) == names
            assert all(c.first[n].shape == c.second[n].shape == p.shape for n, p in c.parameters.items())
        step = 8 * task.costs.per_usage(task.pool, 8)
        assert ledger.total(SELECT).flops == pytest.approx(16 * step)
        expected = [task.recipe.rate((s + 0.5) / 16) for s in range(16)]
        assert [c.rate for c in actual] == pytest.approx(np.reshape(expected, (4, 4)).mean(axis=1), rel=1e-6)

    def test_the_moments_are_those_of_adam(self, task):
        """The last checkpoint's from the gradients of a loop of one step a time."""
        result = warm_up(task, replace(schedule(task, 0.2, 1), steps=1), seed=3, ledger=Ledger())[0]
        model = task.model(3)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, p in result.parameters.items():
            # After one step m = (1 - b1) g and v = (1 - b2) g^2.
            assert torch.allclose(
                result.first[name].square() / 0.01, result.second[name] / 0.001, rtol=1e-4, atol=1e-12
            )
            moved = result.first[name].abs() > 1e-7
            assert (torch.sign(before[name] - p)[moved] == torch.sign(result.first[name])[moved]).float().mean() > 0.95

    @pytest.mark.parametrize("clip_norm", [None, 0.3])
    def test_the_moments_of_each_epoch_are_the_running_means_of_adam(self, features, clip_norm):
        """Against m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2 by hand, over the gradients of every step."""
        task = features(n=60, batch_size=8, clip_norm=clip_norm)
        norms, expected = [], []
        first, second = {}, {}
        losses = task.training_losses

        def watched(model, batch):
            named = dict(model.named_parameters())
            gradient = torch.autograd.grad(losses(model, batch).mean(), list(named.values()))
            norm = torch.sqrt(sum(g.square().sum() for g in gradient))
            norms.append(float(norm))
            scale = 1.0 if clip_norm is None else min(1.0, clip_norm / float(norm))
            for name, g in zip(named, gradient, strict=True):
                first[name] = 0.9 * first.get(name, 0) + 0.1 * scale * g
                second[name] = 0.999 * second.get(name, 0) + 0.001 * (scale * g) ** 2
            expected.append((dict(first), dict(second)))
            return losses(model, batch)

        task.training_losses = watched
        plan = schedule(task, 0.5, 3)
        checkpoints = warm_up(task, plan, seed=0, ledger=Ledger())
        assert len(expected) == plan.steps * plan.epochs
        assert clip_norm is None or max(norms) > clip_norm
        for checkpoint in checkpoints:
            for actual, right in zip(
                (checkpoint.first, checkpoint.second), expected[checkpoint.steps - 1], strict=True
            ):
                assert actual.keys() == right.keys()
                for name, x in actual.items():
                    torch.testing.assert_close(x, right[name], rtol=1e-3, atol=1e-9)

    def test_a_small_pool_still_has_steps(self, features):
        task = features(n=5, batch_size=8, sources=0)
        assert [c.steps for c in warm_up(task, schedule(task, 0.05, 3), seed=0, ledger=Ledger())] == [1, 2, 3]

    def test_seeds_draw_other_examples(self, task):
        scores = [rank(task, seed=s).scores_of(task.pool) for s in (0, 0, 1)]
        assert (scores[0] == scores[1]).all()
        assert (scores[0] != scores[2]).any()


def checkpoint_of(task, **changes):
    return replace(warm_up(task, schedule(task, 0.2, 1), seed=0, ledger=Ledger())[0], **changes)


class TestCheckpoint:
    def test_without_moments_it_is_refused(self, task):
        bare = checkpoint_of(task, first={}, second={})
        result = GradientFeatures(Less().feature_config(), task, task.model(0), 0, Ledger())
        with pytest.raises(CheckpointError, match=r"no moments of Adam for 4 of 4 parameters, such as .*0.bias"):
            result.load(bare)
        GradientFeatures(Less(recipe="sgd").feature_config(), task, task.model(0), 0, Ledger()).load(bare)

    def test_half_of_the_moments_is_refused(self, task):
        sound = checkpoint_of(task)
        with pytest.raises(CheckpointError, match="have only one of them"):
            AdamDirection("paper", sound.first, {}, 1)
        direction = AdamDirection("paper", {"a": torch.ones(3)}, {"a": torch.ones(3)}, 1)
        with pytest.raises(CheckpointError, match="no moments of Adam for 'b'"):
            direction("b", torch.ones(1, 3))

    def test_of_another_model_is_refused(self, task):
        sound = checkpoint_of(task)
        with pytest.raises(CheckpointError, match="another model"):
            sound.load_into(nn.Linear(2, 2))
        with pytest.raises(CheckpointError, match=r"0.weight.*shape"):
            replace(sound, parameters={**sound.parameters, "0.weight": torch.ones(2)}).load_into(task.model(0))

    def test_its_hash_is_of_all_it_holds(self, task):
        sound = checkpoint_of(task)
        other = {n: x + (n == "2.bias") for n, x in sound.second.items()}
        hashes = {
            c.content_hash for c in (sound, replace(sound, second=other), replace(sound, steps=7), copy.deepcopy(sound))
        }
        assert len(hashes) == 3
        assert isinstance(sound, Checkpoint)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_warm_up_is_planned_in_batches_of_similar_length(texts, share):
    task, ledger = texts(n=400, batch_size=8), Ledger()
    plan = schedule(task, share, 4)
    warm_up(task, plan, seed=0, ledger=ledger)
    assert warmup_flops(task, plan) == pytest.approx(ledger.total().flops, rel=0.15)


class TestAWarmUpThatIsKilled:
    """Of 3 epochs of 4 steps, each step written down; what `killed` counts are steps and the ends of epochs."""

    def work(self, task):
        ledger = Ledger()
        result = warm_up(task, schedule(task, 0.5, 3), seed=0, ledger=ledger)
        return [c.content_hash for c in result], [c.rate for c in result], ledger.to_json(seconds=False)

    @pytest.mark.parametrize("every", [1, 3])
    @pytest.mark.parametrize("kills", [(1,), (6, 3), (0, 2, 4)])
    def test_equals_one_that_was_not(self, task, tmp_path, kills, every):
        config = CheckpointConfig(every_seconds=None, every_steps=every)
        assert resumed(tmp_path, lambda: self.work(task), config, kills) == self.work(task)

    def test_goes_on_in_the_epoch_that_was_under_way(self, task, tmp_path):
        """Killed after the sixth step: the second process takes the other six, with moments and rates of the whole."""
        plain, calls = task.training_losses, []
        task.training_losses = lambda *given: calls.append(1) or plain(*given)
        uninterrupted = self.work(task)
        assert len(calls) == 12
        assert resumed(tmp_path, lambda: self.work(task), kills=(5,)) == uninterrupted
        assert len(calls) == 12 + 6

    def test_an_adapter_and_running_means(self, features, tmp_path):
        """Frozen weights are not kept, running means are."""
        task = features(hidden=8, n=60, batch_size=8)
        build = task._build
        task._build = lambda: nn.Sequential(nn.BatchNorm1d(6), build().requires_grad_(False), nn.Linear(3, 3))
        result = warm_up(task, schedule(task, 0.5, 2), seed=0, ledger=Ledger())
        assert {n.split(".")[0] for n in result[0].parameters} == {"0", "2"}
        assert set(result[0].buffers) == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
        assert not torch.equal(result[0].buffers["0.running_mean"], result[1].buffers["0.running_mean"])
        assert resumed(tmp_path, lambda: self.work(task)) == self.work(task)


def test_a_warm_up_that_is_too_dear_is_refused(task):
    plan = schedule(task, 0.5, 3)
    uninterrupted = Ledger()
    warm_up(task, plan, seed=0, ledger=uninterrupted)
    short = Ledger(limit=0.6 * uninterrupted.total().flops)
    with pytest.raises(BudgetError, match=r"epoch 2 of 3 ends after 7 of 8 steps.*lower warmup_share or checkpoints"):
        warm_up(task, plan, seed=0, ledger=short)
