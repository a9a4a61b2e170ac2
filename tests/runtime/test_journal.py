"""The journal: what is done answers for itself, other runs are refused, and a signal loses nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import numpy as np
import pytest
import torch

from cads.accounting.ledger import SELECT, Ledger
from cads.errors import BudgetError, CheckpointError, ConfigError, DataError, NonFiniteError, SelectionError
from cads.runtime import journal as journal_module
from cads.runtime.checkpoint import CheckpointConfig, State
from cads.runtime.journal import Journal, map_shards, replay_or_run
from cads.runtime.lockstep import StepReporter
from cads.runtime.signals import Interrupted, Interrupts
from tests.support.killed_runs import EVERY_STEP, IDENTITY, resumed, same_fit, trained


class TestJournal:
    def journal(self, tmp_path, config=EVERY_STEP, **identity):
        return Journal(tmp_path / "journal", {**IDENTITY, **identity}, config)

    def do(self, log, value, ledger=None, arguments=()):
        def compute(_):
            log.append(value)
            ledger is None or ledger.charge(SELECT, "s", value)
            return State({"value": value}, {"x": torch.full((2,), float(value))})

        return replay_or_run("doing", list(arguments), ledger or Ledger(), compute)

    def test_what_is_done_answers_with_its_charges(self, tmp_path):
        values = [0.1, 0.2, 0.3]
        ledgers = [Ledger(), Ledger(), Ledger()]
        log = []
        for value in values:
            self.do(log, value, ledgers[0])
        for ledger in ledgers[1:]:
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                states = [self.do(log, value, ledger) for value in values]
        assert log == values * 2
        assert [s.values["value"] for s in states] == values
        assert [s.tensors["x"].tolist() for s in states] == torch.tensor(values)[:, None].expand(3, 2).tolist()
        assert {x.total().flops for x in ledgers} == {0.1 + 0.2 + 0.3}, "sums are equal to the last bit"

    def test_a_run_that_does_something_else_is_refused(self, tmp_path):
        for arguments in ([1], [2]):
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                if arguments == [1]:
                    self.do([], 1, arguments=arguments)
                else:
                    with pytest.raises(CheckpointError, match=r"operation 0 .* does not repeat the one before"):
                        self.do([], 1, arguments=arguments)

    def test_operations_within_one_are_part_of_it(self, tmp_path):
        def outer(_):
            return State({"sum": sum(self.do(log, v).values["value"] for v in (1, 2))})

        for expected in ([1, 2, 3], []):
            log = []
            with self.journal(tmp_path, CheckpointConfig(every_seconds=0)).open():
                assert replay_or_run("outer", [], Ledger(), outer).values["sum"] == 3
                self.do(log, 3)
            assert log == expected

    def test_another_run_is_refused_by_what_differs(self, tmp_path):
        with self.journal(tmp_path, settings={"train": {"batch_size": 8}}).open() as journal:
            self.do([], 1)
            journal.store.flush()
        with pytest.raises(CheckpointError, match=r"settings\.train\.batch_size was 8, now 16"):
            self.journal(tmp_path, settings={"train": {"batch_size": 16}})
        with pytest.raises(CheckpointError, match="pool was null, now 'abc'"):
            self.journal(tmp_path, settings={"train": {"batch_size": 8}}, pool="abc")

    def test_finished_shards_survive(self, tmp_path):
        done = []

        def shard(ledger, last):
            def score(i):
                if i == last:
                    raise RuntimeError("the machine is gone")
                done.append(i)
                ledger.charge(SELECT, "scores", 0.1, tokens=i)
                return np.arange(i, dtype=np.float64)

            return score

        plain = Ledger()
        expected = map_shards("scores", [], plain, 6, shard(plain, None))
        done.clear()
        for last in (2, 4, None):
            ledger = Ledger()
            with contextlib.suppress(RuntimeError), self.journal(tmp_path).open():
                actual = map_shards("scores", [], ledger, 6, shard(ledger, last))
        assert done == [0, 1, 2, 3, 4, 5]
        np.testing.assert_array_equal(actual, expected)
        assert ledger.total().flops == plain.total().flops
        assert ledger.total().tokens == plain.total().tokens == 15

    def halves(self, tmp_path, taken, last=None):
        """An operation, and a pass of four shards that fails at `last`."""
        ledger = Ledger()

        def shard(i):
            if i == last:
                raise ZeroDivisionError
            taken.append(i)
            return np.full(1, i)

        with self.journal(tmp_path).open():
            self.do([], 1, ledger)
            return map_shards("pass", [], ledger, 4, shard).tolist()

    def test_where_a_pass_was_outlives_a_damaged_record_of_what_came_before(self, tmp_path):
        taken = []
        with pytest.raises(ZeroDivisionError):
            self.halves(tmp_path, taken, last=2)
        (tmp_path / "journal" / "000001-finished" / "values.json").write_text("{}")
        assert self.halves(tmp_path, taken) == taken == [0, 1, 2, 3]

    def fail_after_one(self, journal, log, error):
        with journal.open():
            self.do(log, 1)
            raise error

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("CUDA error"), ValueError("a bug"),
            OSError(errno.ENOSPC, "full"), CheckpointError("damaged"),
            NonFiniteError("NaN", step=0, ids=[], learning_rate=0.1),
        ],
        ids=lambda error: type(error).__name__,
    )  # fmt: skip
    def test_what_is_done_outlives_a_failure_of_what_follows(self, tmp_path, error):
        log, never = [], CheckpointConfig(every_seconds=None)
        with pytest.raises(type(error)):
            self.fail_after_one(self.journal(tmp_path, never), log, error)
        with self.journal(tmp_path, never).open():
            self.do(log, 1)
        assert log == [1]

    @pytest.mark.parametrize("kind", [ConfigError, DataError, BudgetError, SelectionError])
    def test_a_refused_setting_can_be_corrected(self, tmp_path, kind):
        log, never = [], CheckpointConfig(every_seconds=None)
        with pytest.raises(kind):
            self.fail_after_one(self.journal(tmp_path, never, settings={"batch_size": 8}), log, kind("lower it"))
        with self.journal(tmp_path, never, settings={"batch_size": 4}).open() as journal:
            assert not journal.resumed
            self.do(log, 1)
        assert log == [1, 1]

    def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(self, tmp_path, monkeypatch, caplog):
        def full(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        monkeypatch.setattr("cads.runtime.checkpoint.remove_folder", full)
        assert self.halves(tmp_path, []) == [0, 1, 2, 3]
        assert "cannot be removed" in caplog.text

    def test_without_a_journal_nothing_is_kept(self):
        seen = []
        replay_or_run("doing", [], Ledger(), lambda progress: seen.append(type(progress)) or State())
        assert seen == [StepReporter]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_the_step_is_finished_and_written(self, features, tmp_path, number):
        task = features(batch_size=8)
        interrupts = Interrupts()
        plain, calls = task.training_losses, []

        def losses(*given):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), number)
            return plain(*given)

        task.training_losses = losses
        never = CheckpointConfig(every_seconds=None)
        before = signal.getsignal(number)

        def stopped():
            with interrupts.listen(), Journal(tmp_path / "journal", IDENTITY, never, interrupts).open():
                trained(task)

        with pytest.raises(Interrupted, match="goes on from here") as caught:
            stopped()
        assert caught.value.status == 128 + number
        assert signal.getsignal(number) is before
        assert len(calls) == 5
        again = resumed(tmp_path, lambda: trained(task), never, kills=())
        assert len(calls) == 12
        same_fit(trained(task), again)

    def test_what_has_just_finished_is_not_lost(self, tmp_path, monkeypatch):
        """A signal when all is computed, and not yet noted."""
        interrupts, done, plain = Interrupts(), [], journal_module.charges_since

        def signalled(*given):
            os.kill(os.getpid(), signal.SIGTERM)
            return plain(*given)

        def run():
            with interrupts.listen(), Journal(tmp_path, IDENTITY, EVERY_STEP, interrupts).open():
                replay_or_run("doing", [], Ledger(), lambda _: done.append(1) or State({"a": 1}))

        with monkeypatch.context() as patched:
            patched.setattr(journal_module, "charges_since", signalled)
            with pytest.raises(Interrupted, match="after doing"):
                run()
        interrupts = Interrupts()
        run()
        assert len(done) == 1

    def test_between_operations_it_stops_at_once(self):
        def stopped():
            with Interrupts().listen():
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("it went on")

        with pytest.raises(Interrupted, match="between two operations"):
            stopped()
