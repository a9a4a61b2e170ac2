"""What processes divide and send one another: shards in order, states as they were, errors of one to all."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from cads.accounting.ledger import SELECT, Ledger
from cads.errors import CadsError, ConfigError, DataError
from cads.runtime import processes
from cads.runtime.checkpoint import State
from cads.runtime.journal import map_shards
from cads.runtime.lockstep import map_in_turn
from cads.runtime.processes import RemoteError, world_group
from tests.support.forked_processes import _alone, _free_port, ended, entries, spread


class TestShards:
    @pytest.mark.parametrize("count", [1, 2, 3, 7, 19])
    def test_they_come_in_order_and_charge_in_order(self, tmp_path, count):
        def work():
            ledger = Ledger()

            def shard(i):
                # Sums of these depend on their order.
                ledger.charge(SELECT, "scoring", 0.1 * 3**i, tokens=i)
                return np.arange(i + 1) * 1.5

            result = map_shards("scoring", ["x"], ledger, count, shard)
            return [result.tolist(), entries(ledger)]

        assert spread(2, work, tmp_path) == [work()] * 2

    def test_the_error_of_one_is_that_of_all(self, tmp_path):
        def work(error):
            def shard(i):
                if i == 3:
                    raise error
                return np.zeros(1)

            try:
                map_in_turn(Ledger(), range(5), shard)
            except CadsError as found:
                return [type(found).__name__, str(found)]

        (first, second) = spread(2, lambda: work(DataError("example 'x' is odd")), tmp_path)
        assert first == second == ["DataError", "example 'x' is odd"]

        def strange():
            return work(ZeroDivisionError("y"))

        first, second = spread(2, strange, tmp_path)
        assert first == ["RemoteError", "process 1: ZeroDivisionError: y"]
        assert second[0] == "ZeroDivisionError"
        assert issubclass(RemoteError, CadsError)


class TestExchange:
    def test_states_arrive_as_they_were_sent(self, tmp_path):
        def work():
            rank = world_group().rank
            kinds = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
            sent = State(
                {"rank": rank, "nested": [1.5, None, {"a": float("inf")}]},
                {str(k): torch.arange(rank, rank + 6).to(k).view(2, 3) for k in kinds}
                | {"scalar": torch.tensor(rank), "empty": torch.zeros(0, 3)},
            )
            parts = world_group().gather(lambda: sent)
            first = world_group().broadcast(lambda: sent)
            return [[p.digest for p in parts], first.digest, sent.digest]

        a, b = spread(2, work, tmp_path)
        assert a[0] == b[0] == [a[2], b[2]]
        assert a[1] == b[1] == a[2]

    def test_what_cannot_be_sent_is_an_error_of_all(self, tmp_path):
        first, second = spread(2, lambda: world_group().gather(self.odd), tmp_path)
        assert second[0] == "TypeError"
        assert first[0] == "RemoteError"
        assert "process 1: TypeError" in first[1]

    def odd(self):
        return State({} if world_group().first else {"odd": object()})

    def test_others_that_are_not_there_are_missed_in_a_sentence(self, tmp_path):
        alone = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}

        def work():
            os.environ.update({**alone, "LOCAL_RANK": "1", processes.TIMEOUT_VARIABLE: "1"})
            AcceleratorState._reset_state(reset_partial_state=True)
            world_group.cache_clear()
            try:
                world_group()
            except CadsError as error:
                (tmp_path / "said").write_text(f"{type(error).__name__}: {error}")

        ended([_alone(work)])
        said = (tmp_path / "said").read_text()
        assert said.startswith("ProcessError: this process does not find the 1 others within 1 s (RANK=1, WORLD_SIZE=2")

    def test_processes_that_are_not_given_the_same_are_refused(self, tmp_path):
        result = spread(2, lambda: world_group().check_identical("the data", world_group().rank), tmp_path)
        assert [f[0] for f in result] == ["ProcessError"] * 2
        assert "the data differs between processes" in result[0][1]

    @pytest.mark.parametrize("text", ["soon", "-1", "nan", "0"])
    def test_a_time_out_that_is_none_is_refused(self, monkeypatch, text):
        monkeypatch.setenv(processes.TIMEOUT_VARIABLE, text)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="must be a positive number of seconds"):
            world_group.__wrapped__()

    @pytest.mark.parametrize("size", ["1", "2"])
    @pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
    def test_a_launcher_that_divides_weights_is_refused_with_the_way_to_fsdp2(self, monkeypatch, kind, size):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
        with pytest.raises(ConfigError, match=rf"{kind} .*torchrun.*sharding: full.*FSDP2"):
            world_group.__wrapped__()
