"""CADS against the packages that people install, at equal total cost, on the worlds of `experiments.online`.

    pip install 'cads-select[rivals]'
    python -m experiments.leaderboard --out runs/leaderboard
    python -m experiments.leaderboard --out runs/leaderboard --results experiments/results/leaderboard.md

Cells, budgets and options are those of `experiments.online`. A rival whose package is missing is left out with a word.
`OUT/packages.json` has the versions. `--results` writes the page of the cells that are there, and the cells as `.jsonl`
beside it: as `OUT/cells.jsonl`, they go on elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cads.runtime.atomic_files import whole_file
from cads.selector import Selector
from experiments.leaderboard_report import PACKAGES, write_leaderboard
from experiments.online import Method, parse, run_missing
from experiments.online_report import HIDDEN, ONLINE
from experiments.rivals.adapt import Adapt
from experiments.rivals.aligned_batches import AlignedBatches
from experiments.rivals.bergson import BergsonEkfac, BergsonGradients
from experiments.rivals.blade import Blade
from experiments.rivals.botorch import BoTorch
from experiments.rivals.cleanlab import CleanlabFolds, CleanlabTarget
from experiments.rivals.datacull import Ccs, Rcap, Tdds
from experiments.rivals.facility_location import FacilityLocation
from experiments.rivals.mixmin import MixMin
from experiments.rivals.mixtures import LogLinear, Optuna
from experiments.rivals.packages import installed_version


@dataclass(frozen=True)
class Rival(Method):
    """A method that is no installed selector of this package.

    Attributes:
        kind: class of the selector. package: distribution that it needs, or "".
    """

    kind: type[Selector] | None = None
    package: str = ""

    def build(self) -> Selector:
        """The selector."""
        assert self.kind is not None
        return self.kind(**self.options)


RIVALS = (
    Rival("cleanlab, 3 folds", "", kind=CleanlabFolds, package="cleanlab"),
    Rival("cleanlab, target model", "", kind=CleanlabTarget, package="cleanlab"),
    Rival("optuna", "", kind=Optuna, package="optuna"),
    Rival("log-linear", "", kind=LogLinear),
    Rival("mixmin", "", kind=MixMin),
    Rival("facility location", "", kind=FacilityLocation, package="submodlib-py"),
    Rival("aligned batches", "", kind=AlignedBatches),
    Rival("adapt", "", kind=Adapt),
    Rival("blade", "", kind=Blade),
    Rival("botorch", "", kind=BoTorch, package="botorch"),
    Rival("datacull, CCS", "", kind=Ccs, package="datacull"),
    Rival("datacull, TDDS", "", kind=Tdds, package="datacull"),
    Rival("datacull, RCAP", "", kind=Rcap, package="datacull"),
    Rival("bergson, gradients", "", kind=BergsonGradients, package="bergson"),
    Rival("bergson, EKFAC", "", kind=BergsonEkfac, package="bergson"),
)
REFERENCES = (
    Method(ONLINE, "cads"),
    Method(HIDDEN, "cads", hidden=True),
    Method("full", "full"),
    Method("joint .3, balanced", "joint", {"target_fraction": 0.3}, balanced=True),
    Method("target-only, balanced", "target-only", balanced=True),
    Method("cut 60%", "loss", {"fraction": 0.6}),
)


def methods(sources: Sequence[str]) -> list[Method]:
    """The references, and the rivals whose packages are installed."""
    return [*REFERENCES, *(rival for rival in RIVALS if not rival.package or installed_version(rival.package))]


def packages() -> dict[str, str]:
    """The package and version of each rival that has one, by name of the method."""
    versions = {rival.name: (rival.package, installed_version(rival.package)) for rival in RIVALS if rival.package}
    return {name: f"{package} {version}" for name, (package, version) in versions.items() if version}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells that are not there yet, or report on those that are."""
    options = parse(__doc__, argv)
    if options.results is not None:
        write_leaderboard(options.out, options.results, [method.name for method in (*REFERENCES, *RIVALS)])
        return
    for rival in RIVALS:
        if rival.package and not installed_version(rival.package):
            print(f"{rival.name} is left out: pip install {rival.package}")
    options.out.mkdir(parents=True, exist_ok=True)
    whole_file(options.out / PACKAGES, json.dumps(packages(), indent=2, sort_keys=True) + "\n")
    run_missing(options, methods)


if __name__ == "__main__":
    main()
