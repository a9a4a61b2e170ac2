"""Names of sources that are given none: they come from paths, and no two files have the same one."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cads.tasks.language.rows import TextSource

log = logging.getLogger(__name__)


def names_and_prefixes(sources: Sequence[TextSource]) -> list[tuple[str, str]]:
    """The name of each source, and the prefix of the ids of its rows if they are numbered.

    A name that a source was given stays; two sources of one given name are one source, whose rows are numbered apart.
    Names that come from files and would be equal are lengthened by the folders of the files, or by their suffixes where
    these alone differ. This is said once.
    """
    labels = [(source.name, source.name) for source in sources]
    taken = {source.name for source in sources}
    renamed = []
    for name in sorted(taken):
        members = [i for i, source in enumerate(sources) if source.name == name]
        derived = [i for i in members if not sources[i].is_named]
        given = [i for i in members if i not in derived]
        if _places(sources, given) > 1:
            for i, label in _labels(sources, given, set(), 0).items():
                labels[i] = name, f"{name}/{label}"
        if derived and _places(sources, members) > 1:
            for i, label in _labels(sources, derived, taken, 1).items():
                labels[i] = label, label
                renamed.append(f"{label!r} ({sources[i].location})")
    if renamed:
        log.warning("files of equal names are called %s; `name` gives them others", ", ".join(renamed))
    return labels


def _places(sources: Sequence[TextSource], members: Sequence[int]) -> int:
    return len({_place(sources[i]) for i in members})


def _place(source: TextSource) -> tuple[str, ...]:
    """What tells a file or data set from all others."""
    if source.path is not None:
        return (str(Path(source.path).resolve()),)
    return str(source.dataset), source.config or "", source.split


def _candidates(source: TextSource, depth: int) -> list[str]:
    """Names from short to long: of a file, with 0 to depth - 1 of its folders, at first without its suffix."""
    if source.path is None:
        parts = [str(source.dataset), source.config or "default", source.split]
        return [source.derived_name, *("/".join(parts[:n]) for n in (1, 2, 3))]
    path = Path(os.path.abspath(source.path))
    folders = path.parent.parts[1:]
    within = [folders[max(0, len(folders) - n) :] for n in range(depth)]
    return ["/".join([*above, name]) for name in (source.derived_name, path.name) for above in within] + [str(path)]


def _labels(sources: Sequence[TextSource], members: Sequence[int], taken: set[str], level: int) -> dict[int, str]:
    """The shortest names from `level` on that tell the places apart and are not taken."""
    depth = max((len(Path(os.path.abspath(sources[i].path or ".")).parts) for i in members), default=1)
    candidates = {i: _candidates(sources[i], depth) for i in members}
    last = max(map(len, candidates.values())) - 1
    places = _places(sources, members)
    for n in range(level, last + 1):
        labels = {i: names[min(n, len(names) - 1)] for i, names in candidates.items()}
        if len(set(labels.values())) == places and not taken & set(labels.values()):
            return labels
    return labels
