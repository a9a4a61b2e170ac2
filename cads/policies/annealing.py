"""The course of a policy: its expected size and the length of its steps, as in PBCS (Zhou et al., ICML 2022).

Source of the numbers: the authors' code, github.com/x-zho14/Probabilistic-Bilevel-Coreset-Selection. The course of the
size is that of Zhu and Gupta (2017, arXiv 1710.01878) for the pruning of networks.
"""

from __future__ import annotations

import math

ANNEALED = (0.16, 0.6)
"""Shares of the run (t_s, t_e) between which the expected size falls."""


def annealed_size(start: float, end: float, progress: float) -> float:
    """K at a share `progress` of the run: K_e + (K_s - K_e) (1 - (t - t_s) / (t_e - t_s))^3 between t_s and t_e.

    Args:
        start: K_s, which holds until t_s. end: K_e, which holds from t_e on. progress: t, from 0 to 1.
    """
    begin, finish = ANNEALED
    remaining = 1 - min(1.0, max(0.0, (progress - begin) / (finish - begin)))
    return end + (start - end) * remaining**3


def cosine(progress: float) -> float:
    """The share of the first step's length that is left: (1 + cos(pi t)) / 2. Its mean over a run is 1/2."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
