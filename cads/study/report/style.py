"""How methods look in every figure: colours that the colour-blind can tell apart, with a marker each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

INK = "#1b1c1f"
"""Text and axes. In a page they take the colour of its text, so that figures follow dark mode."""
FAINT = "#8a8d91"
"""Grids and reference lines, legible on white and on black."""
PALETTE = {
    "vermilion": "#d55e00",
    "blue": "#0077bb",
    "magenta": "#c2488f",
    "teal": "#00947f",
    "ochre": "#b98300",
    "violet": "#8867c7",
    "brown": "#96683c",
    "grey": "#7d8085",
    "sky": "#3b9cc9",
    "moss": "#6b8e23",
    "rose": "#d9606b",
}
"""At least 3:1 against white and against near-black, after Okabe and Ito and Tol."""
OF_METHOD = {
    "cads-s": "vermilion",
    "cads-e": "blue",
    "cads-s-penalty": "magenta",
    "joint": "teal",
    "target-only": "ochre",
    "source": "violet",
    "full": "brown",
    "random": "grey",
    "bm25": "moss",
    "embedding": "sky",
    "embed": "sky",
    "ppl": "violet",
    "perplexity": "violet",
    "less": "rose",
    "gradient": "rose",
}
"""Colours of known methods; others take the one that their name falls on."""
RESERVED = ("vermilion", "blue")
"""Colours that no unknown method takes: those of the two selectors that a reader looks for."""
MARKERS, LINES = "osD^vPX<>ph*", ("-", "--", "-.")
SERIES = ("#35608d", "#b98300", "#00947f", "#c2488f", "#7d8085", "#d55e00", "#8867c7", "#6b8e23")
"""For things that are no methods: sources, stages."""


@dataclass(frozen=True)
class MethodStyle:
    """Of one method: colour, marker, and style of its line."""

    colour: str
    marker: str
    line: str


def colour_of(selector: str) -> str:
    """The colour of a method, which depends on its name alone."""
    names = [name for name in PALETTE if name not in RESERVED]
    fallback = names[int(hashlib.sha256(selector.encode()).hexdigest(), 16) % len(names)]
    return PALETTE[OF_METHOD.get(selector, fallback)]


def method_styles(methods: Iterable[tuple[str, str]]) -> dict[str, MethodStyle]:
    """The look of each label in a study.

    Args:
        methods: (label, selector) of all methods in it; labels of one selector share its colour and differ in
            marker and line, as do methods whose colours coincide.
    """
    made: dict[str, MethodStyle] = {}
    taken: dict[str, int] = {}
    for label, selector in sorted(set(methods), key=lambda pair: (pair[0] != pair[1], pair)):
        if label in made:
            continue
        colour = colour_of(selector)
        n_before = taken.get(colour, 0)
        taken[colour] = n_before + 1
        first = list(PALETTE.values()).index(colour)
        made[label] = MethodStyle(colour, MARKERS[(first + n_before) % len(MARKERS)], LINES[n_before % len(LINES)])
    return made
