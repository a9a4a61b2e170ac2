"""The style of methods in every figure: colours for colour-blind readers, markers and lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

INK = "#1b1c1f"
"""Text and axes. In a page they are drawn in the colour of its text, so that figures follow dark mode."""
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
"""Contrast of at least 3:1 with white and with near-black; after Okabe and Ito and Tol."""
OF_METHOD = {
    "cads": "vermilion",
    "cads-s": "vermilion",
    "cads-e": "vermilion",
    "search": "blue",
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
"""Colours of known methods. The colour of another method is chosen by a hash of its name."""
RESERVED = ("vermilion", "blue")
"""Colours that no unknown method gets: those of `cads` and `search`."""
MARKERS, LINES = "osD^vPX<>ph*", ("-", "--", "-.")
SERIES = ("#35608d", "#b98300", "#00947f", "#c2488f", "#7d8085", "#d55e00", "#8867c7", "#6b8e23")
"""Colours of sources and stages, which are no methods."""


@dataclass(frozen=True)
class MethodStyle:
    """Colour, marker and line style of one method."""

    colour: str
    marker: str
    line: str


def colour_of(selector: str) -> str:
    """The colour of a method. It depends on the name alone."""
    names = [name for name in PALETTE if name not in RESERVED]
    fallback = names[int(hashlib.sha256(selector.encode()).hexdigest(), 16) % len(names)]
    return PALETTE[OF_METHOD.get(selector, fallback)]


def method_styles(methods: Iterable[tuple[str, str]]) -> dict[str, MethodStyle]:
    """The style of each label in a study.

    Labels of one selector have the same colour and differ in marker and line. So do methods whose colours coincide.

    Args:
        methods: (label, selector) of all methods of the study.
    """
    styles: dict[str, MethodStyle] = {}
    n_uses: dict[str, int] = {}
    for label, selector in sorted(set(methods), key=lambda pair: (pair[0] != pair[1], pair)):
        if label in styles:
            continue
        colour = colour_of(selector)
        n_before = n_uses.get(colour, 0)
        n_uses[colour] = n_before + 1
        first = list(PALETTE.values()).index(colour)
        styles[label] = MethodStyle(colour, MARKERS[(first + n_before) % len(MARKERS)], LINES[n_before % len(LINES)])
    return styles
