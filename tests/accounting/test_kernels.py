"""Kernels that PyTorch does not count: formulas for some, a warning of the others, and no model is free."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

import cads
from cads.accounting.measured import count_flops, uncounted_operations
from cads.errors import ConfigError

B, T, D, H = 2, 5, 8, 6


def counted(function):
    with torch.no_grad():
        return count_flops(function)


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_an_lstm_costs_its_matrix_products(layers, both):
    lstm, x = nn.LSTM(D, H, num_layers=layers, bidirectional=both), torch.zeros(T, B, D)
    directions = 1 + both
    widths = [D, *([H * directions] * (layers - 1))]
    expected = sum(directions * 2 * T * B * (4 * H * width + 4 * H * H) for width in widths)
    assert counted(lambda: lstm(x)) == expected
    assert count_flops(lambda: lstm(x)[0].sum().backward()) == 3 * expected


def test_other_kernels_cost_their_products():
    x, w, v = torch.zeros(B, D), torch.zeros(D, D), torch.zeros(D)
    bilinear = nn.Bilinear(D, D, 3)
    assert counted(lambda: bilinear(x, x)) == 2 * B * 3 * D * D
    assert counted(lambda: x @ v) == 2 * B * D
    assert counted(lambda: torch.addmv(v, w, v)) == 2 * D * D
    assert counted(lambda: torch.dot(v, v)) == 2 * D
    assert counted(lambda: torch.cdist(x, w)) == 3 * B * D * D
    many = torch.zeros(40, D)
    assert counted(lambda: torch.cdist(many, many)) == 2 * 40 * 40 * D


def test_an_lstm_costs_as_much_as_the_gru_of_four_thirds():
    x = torch.zeros(T, B, D)
    lstm, gru = nn.LSTM(D, H), nn.GRU(D, H)
    assert 3 * counted(lambda: lstm(x)) == 4 * counted(lambda: gru(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.GELU(), nn.LayerNorm(D), nn.Dropout()),
        nn.TransformerEncoderLayer(D, 2, 16, batch_first=True),
        nn.Sequential(nn.Conv1d(T, 3, 3), nn.BatchNorm1d(3), nn.MaxPool1d(2), nn.Upsample(scale_factor=2)),
        nn.LSTM(D, H),
        nn.GRU(D, H),
    ],
)
def test_usual_layers_are_counted(module):
    def run():
        output = module(torch.zeros(B, T, D))
        (output[0] if isinstance(output, tuple) else output).sum().backward()

    assert uncounted_operations(run) == []


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 1)

    def forward(self, x):
        return self.out(torch.fft.rfft(x).abs())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x * self.scale).sum(dim=1, keepdim=True)


def own(model):
    rng = np.random.default_rng(0)
    parts = {name: (rng.normal(size=(12, 4)), np.ones((12, 1))) for name in ("pool", "target", "test")}
    return cads.TensorTask(model, **parts, loss=nn.MSELoss(reduction="none"), recipe=cads.TrainConfig(batch_size=4))


def test_what_is_not_counted_is_named_once(caplog):
    with caplog.at_level(logging.WARNING):
        cads.train(own(Spectral), "2 epochs", method="full")
    assert caplog.text.count("are not counted") == 1
    assert "aten._fft_r2c" in caplog.text


def test_a_model_without_counted_products_is_refused():
    with pytest.raises(ConfigError, match=r"no operation whose FLOPs are counted.*nn.Linear"):
        cads.train(own(Scaled), "2 epochs", method="full")
