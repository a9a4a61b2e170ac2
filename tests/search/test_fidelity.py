"""The fidelity schedule: within its allowance, and its highest fidelity never falls as the allowance grows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cads.search.constants import FROM_SCRATCH, PRETRAINED
from cads.search.fidelity import fidelity_schedule

POSITIVE = st.floats(1e-2, 1e4)


@given(
    steps=st.floats(1, 1e5),
    allowance=POSITIVE,
    step=st.floats(1e-3, 1e15),
    measuring=st.floats(0, 100),
    passes=st.floats(1e-2, 1e3),
    pretrained=st.booleans(),
)
def test_the_schedule_stays_within_its_allowance(steps, allowance, step, measuring, passes, pretrained):
    training, per_run = steps * step, measuring * step
    constants = PRETRAINED if pretrained else FROM_SCRATCH
    rungs = fidelity_schedule(training, allowance * step, step, per_run, passes, constants=constants)
    assert sum(r.n_trials * (r.flops + per_run) for r in rungs) <= allowance * step * (1 + 1e-9)
    assert all(r.n_trials >= 2 for r in rungs)
    assert all(r.flops == pytest.approx(r.fidelity * training) for r in rungs)
    assert all(r.flops >= min(training, constants.min_steps * step) * (1 - 1e-9) for r in rungs)
    assert all(0 < r.fidelity * constants.data_factor <= r.data_fraction <= 1 for r in rungs)
    kept_passes = min(passes, math.sqrt(passes * constants.max_kept_passes)) / constants.data_factor
    visits = [passes * rung.fidelity / rung.data_fraction for rung in rungs]
    for rung, seen in zip(rungs[:-1], visits, strict=False):
        assert rung.data_fraction == 1 or seen == pytest.approx(kept_passes)
    if rungs and pretrained:
        assert passes > PRETRAINED.full_data_max_passes or all(rung.data_fraction == 1 for rung in rungs)
        assert rungs[-1].data_fraction == 1 or visits[-1] == pytest.approx(kept_passes)
    elif rungs and rungs[-1].data_fraction < 1:
        assert min(1.0, kept_passes) * (1 - 1e-9) <= visits[-1] <= kept_passes * (1 + 1e-9)
        assert rungs[-1].data_fraction <= max(
            math.sqrt(rungs[-1].fidelity), passes * rungs[-1].fidelity / kept_passes
        ) * (1 + 1e-9)
    fidelities = [r.fidelity for r in rungs]
    assert fidelities == sorted(set(fidelities))


@given(steps=st.floats(1, 1e5), allowance=POSITIVE, measuring=st.floats(0, 100), factor=st.floats(1, 10))
def test_more_allowance_never_buys_a_lower_fidelity(steps, allowance, measuring, factor):
    less, more = (fidelity_schedule(steps, a, 1.0, measuring, 5.0) for a in (allowance, factor * allowance))
    assert len(more) >= len(less)
    spent = [sum(r.n_trials * (r.flops + measuring) for r in rungs) for rungs in (less, more)]
    if len(less) == len(more):
        assert spent[1] >= spent[0]


def test_no_allowance_no_trials():
    assert fidelity_schedule(1e6, 0.0, 1.0, 1.0, 5.0) == []
    assert fidelity_schedule(1e6, 79.0, 1.0, 1.0, 5.0) == []
