"""The measurements on a GPU: all of their code runs with tiny models on a stand-in, and without a GPU they end well."""

from __future__ import annotations

import math

import pytest
import torch

from experiments import gpu
from experiments.gpu import GpuMeasurement, main, measure
from tests.support.pretended_device import pretended_device


def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "device_type", lambda: "cpu")
    assert main(["--out", str(tmp_path / "out.md")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out.md").exists()


@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")
def test_every_part_runs_where_devices_may_not_mix(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr("cads.accounting.throughput.SIZES", {"cpu": 64, "cuda": 64})
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**6)
    with pretended_device():
        findings = measure(tmp_path, torch.device("cuda"), size="135m", tiny=True, minutes=60)
    by_case: dict[str, list[GpuMeasurement]] = {}
    for finding in findings:
        by_case.setdefault(finding.case.split()[0], []).append(finding)
    assert set(by_case) == {"Llama", "CNN,"}
    for name, rows in by_case.items():
        said = {row.what: row for row in rows}
        assert said["`cads train`"].met is True
        # Differences of times of a few steps may have any sign on a busy machine.
        assert math.isfinite(float(said["speed over the plain loop"].value))
        assert math.isfinite(float(said["time of a step over joint"].value))
        assert "planned" in said["peak memory"].value
        assert ("rate over plain passes" in said) == (name == "Llama")
        assert all(row.met is None for row in rows if row.bar), "tiny models are held to no bar"


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    findings = measure(tmp_path, torch.device("cpu"), size="135m", tiny=True, minutes=-1)
    assert len(findings) == 9
    assert all("left out" in finding.value for finding in findings)


def test_bars_are_said_in_the_table():
    assert GpuMeasurement("a", "b", "1.0", ">= 0.9", True).line() == "| a | b | 1.0 | >= 0.9 | met |"
    assert GpuMeasurement("a", "b", "1.0", ">= 0.9", False).line() == "| a | b | 1.0 | >= 0.9 | missed |"
