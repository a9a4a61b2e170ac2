"""Curves of performance over compute, drawn at random."""

from __future__ import annotations

from hypothesis import strategies as st

from cads.study.analysis.frontier import PerformanceCurve


@st.composite
def curves(draw, method: str = "a", p_bar: float | None = None) -> PerformanceCurve:
    p0 = draw(st.floats(10, 60))
    return PerformanceCurve(
        method,
        p0,
        p0 + draw(st.floats(1, 30)) if p_bar is None else p_bar,
        draw(st.floats(0.5, 30)),
        1e18,
        draw(st.sampled_from([0.0, 1e16, 3e17])),
        draw(st.sampled_from(["shifted", "published"])),
    )
