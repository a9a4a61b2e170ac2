"""The constants of the searches, each with its source: one instance for models from scratch, one for pretrained ones.

"Measured" means: on the worlds with known answers, see `experiments/results`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cads.task import Task


@dataclass(frozen=True)
class SearchConstants:
    """The constants of a search. Shares are of C, the FLOPs of the final training, unless they say otherwise."""

    counted_share: tuple[float, float] = (1 / 3, 1.0)
    """Least and greatest FLOPs of selection, in units of the training FLOPs, if the budget covers both.
    Measured."""
    share_per_pass: float = 1 / 12
    """How that share grows with the passes over the pool that the budget buys. Up to four passes, a pass is worth
    nearly as much as one over fresh examples, and after that less and less (Muennighoff et al. 2023, arXiv
    2305.16264)."""
    share_for_min_search: float = 0.0
    """The share may rise to this if a smaller one buys no search. Measured."""

    min_fidelity: float = 1 / 16
    """Share of C, and of each source, of the shortest trials. Calibrated loss at C/16 ranks subsets with a Spearman
    correlation of 0.63 to 0.96 from four passes on. Measured."""
    rung_factor: int = 2
    """Factor of the fidelity from one rung to the next. Successive halving uses 2 to 4 (Jamieson and Talwalkar 2016,
    arXiv 1502.07943)."""
    rung_budget_shares: tuple[tuple[float, ...], ...] = ((1.0,), (0.6, 0.4), (0.4, 0.3, 0.3))
    """How the allowance is divided among rungs, lowest first, where there are one, two and three. With few trials in
    all, it pays to learn from many short ones. Measured."""
    max_kept_passes: float = 16.0
    """Trials make as many passes as the final training, up to this many. Above it they give up passes
    as well as examples: with fewer passes they hide memorisation, with fewer examples they overrate quantity.
    Measured."""
    data_factor: float = 1.0
    """Share of the data that a trial sees, in units of the share that keeps the passes of the final training."""
    full_data_max_passes: float = 0.0
    """Passes of the final training up to which a trial sees the whole pool."""
    shares_data_when_deciding: bool = True
    """Whether trials of the last rung give up passes as well as examples. Trials that give up examples alone overrate
    the quantity of data."""
    min_steps: int = 10
    """Steps of the shortest trial. Trials from the same weights differ only in their data and its order: after ten
    steps they rank subsets of sources with a Spearman correlation of 0.75 to 0.97. Measured."""
    min_trials: int = 3
    """Fewest trials of a search, the one on the full pool among them. One candidate is no search."""

    theta_share: float = 0.1
    """The target model, theta, is trained for this share of C."""
    theta_passes: float = 20.0
    """The target model makes no more passes over the target than this."""
    theta_max_allowance: float = 0.1
    """Share of the allowance that the target model and R, its losses on the pool, may take. With small budgets, trials
    are more informative. Measured."""
    probe_examples: tuple[int, int] = (256, 32)
    """Examples of each source on which R is measured: by default, and if the allowance does not buy so many beside the
    target model. Measured."""
    theta_min_steps: int = 1
    """Fewest steps of the target model, at the cost of the most expensive target examples."""
    guided_trials: int = 2
    """Most trials per source, in the first rung, with which a cheaper target model is worth its cost. Measured."""
    subtracts_reference: bool = False
    """Whether the loss of the reference model, trained on the pool, is subtracted from R, and the first rung begins
    with subsets of several sources rather than single ones."""

    @property
    def n_probed_models(self) -> int:
        """Models whose losses make up R: the target model, and the reference model if its losses are subtracted."""
        return 1 + self.subtracts_reference


FROM_SCRATCH = SearchConstants()
"""For models that begin with random weights."""
PRETRAINED = SearchConstants(
    # They memorise a small pool within few passes, so that further passes are worth less.
    share_per_pass=1 / 6,
    # The length of their training matters less than its data. Measured on instruct-small.
    share_for_min_search=3.0,
    # Their shortest trials mislead most: they hide memorisation.
    rung_budget_shares=((1.0,), (0.5, 0.5), (0.4, 0.3, 0.3)),
    # Their trials make twice the passes: the shorter a trial, the less it memorises.
    data_factor=1 / 2,
    # At so few passes the final training sees a good subset some three times, which does no harm yet. A trial on a part
    # of the data would miss the rest of that subset. Of 900 examples the best fifth is 0.16 to 0.24 nats better than
    # the pool after ten steps on all of it, as after the final training, but hardly or not better after ten steps on a
    # seventh. Measured on compare-language.
    full_data_max_passes=2.5,
    shares_data_when_deciding=False,
    # With so many steps the target model tells sources apart. Measured on instruct-small.
    theta_min_steps=8,
    # They find some examples easier than others, whatever the value of these for training. Subtracting the loss of the
    # reference model removes that, as the penalty subtracts the loss within reach.
    subtracts_reference=True,
)
"""For models that begin with pretrained weights."""


def constants_of(task: Task) -> SearchConstants:
    """The constants that hold for the models of a task."""
    return PRETRAINED if task.pretrained else FROM_SCRATCH
