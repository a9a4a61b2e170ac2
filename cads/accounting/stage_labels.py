"""Stages of a ledger in words.

Stored results hang on the names of stages: they stay in ledgers, tables and journals. These labels are for display.
"""

from __future__ import annotations

import re

MEASURING = ", measuring"
LABELS = {
    "theta": "target model",
    "theta, with the pool": "target model, with the pool",
    "R": "losses of the target model",
    "losses of theta": "losses of the target model",
    "u": "reference model",
    "l*": "losses of the reference model",
    "losses of u": "losses of the reference model",
    "policy": "policy updates",
    "pass": "pass over the pool",
    "guard": "trials of the guard",
    "errors": "error norms",
    "plain steps": "inner training, plain steps",
    "unrolled steps": "inner training, unrolled steps",
}
"""Stages whose names say little to readers. All others are shown as they are, but trials, which name their length."""
TRIALS = re.compile(r"short runs, C/(\d+(?:\.\d+)?(?:e\+?\d+)?)")


def stage_label(stage: str) -> str:
    """What readers see of a stage."""
    name = stage.removesuffix(MEASURING)
    if match := TRIALS.fullmatch(name):
        divisor = float(match[1])
        share = "all" if divisor == 1 else f"1/{divisor:.10g}"
        label = f"trials, {share} of the budget"
    else:
        label = LABELS.get(name, name)
    return label + stage[len(name) :]


def stage_tag(stage: str) -> str:
    """The same for a tag of TensorBoard, which groups tags by what stands before their first "/"."""
    return stage_label(stage).replace("/", "-")
