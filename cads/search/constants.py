"""The numbers of the searches, each with where it comes from: one instance for models from scratch, one for pretrained.

"Measured" means: on the worlds with known answers, see `experiments/results`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cads.task import Task


@dataclass(frozen=True)
class SearchConstants:
    """What a search over sources follows, beside the budget. Shares are of C, the FLOPs of the final training."""

    counted_share: tuple[float, float] = (1 / 3, 1.0)
    """Least and greatest FLOPs of selection, in units of what is left for training, if the budget covers both.
    Measured."""
    share_per_pass: float = 1 / 12
    """How that share grows with the passes over the pool that the budget buys. Up to four passes, a pass is worth
    nearly as much as one over fresh examples, and after that less and less (Muennighoff et al. 2023, arXiv
    2305.16264)."""
    share_for_min_search: float = 0.0
    """The share may rise to this where less buys no search at all. Measured."""

    min_fidelity: float = 1 / 16
    """Share of C, and of each source, of the shortest trials. Calibrated loss at C/16 ranks subsets with a Spearman
    correlation of 0.63 to 0.96 from four passes on. Measured."""
    rung_factor: int = 2
    """By what fidelity grows from rung to rung. Successive halving uses 2 to 4 (Jamieson and Talwalkar 2016, arXiv
    1502.07943)."""
    rung_budget_shares: tuple[tuple[float, ...], ...] = ((1.0,), (0.6, 0.4), (0.4, 0.3, 0.3))
    """How the allowance is divided among rungs, lowest first, where there are one, two and three. With few trials in
    all, it pays to learn from many short ones. Measured."""
    max_kept_passes: float = 16.0
    """Trials make as many passes as the final training, up to this many. Above it they lose passes and examples alike:
    fewer passes hide what will be learned by heart, fewer examples make quantity look dear. Measured."""
    data_factor: float = 1.0
    """Share of the data, of what keeps the passes, that a trial sees."""
    full_data_max_passes: float = 0.0
    """Passes of the final training up to which a trial sees the whole pool."""
    shares_data_when_deciding: bool = True
    """Whether the last rung gives up passes as well as examples. Where examples alone are missing, quantity looks
    dearer than it is."""
    min_steps: int = 10
    """Steps of the shortest trial. Trials from the same weights differ by their data and its order alone: after ten
    steps they rank subsets of sources with a Spearman correlation of 0.75 to 0.97. Measured."""
    min_trials: int = 3
    """Trials, the full pool's among them, below which nothing is spent: one candidate is no search."""

    theta_share: float = 0.1
    """The target model is trained for this share of C."""
    theta_passes: float = 20.0
    """The target model makes no more passes over the target than this."""
    theta_max_allowance: float = 0.1
    """Share of the allowance that the target model and R may take. Where budgets are small, trials tell more.
    Measured."""
    probe_examples: tuple[int, int] = (256, 32)
    """Examples of each source on which R is measured: usually, and where the allowance does not buy these beside the
    target model. Measured."""
    theta_min_steps: int = 1
    """Steps on the dearest target examples that the target model gets at least."""
    guided_trials: int = 2
    """Trials for each source, in the first rung, up to which a cheaper target model is worth having. Measured."""
    subtracts_reference: bool = False
    """Whether R is taken beside the loss of a model trained on the pool, and the first rung begins with subsets of
    several sources rather than single ones."""

    @property
    def n_probed_models(self) -> int:
        """How many models R is measured with: the target model, and the reference model if it is subtracted."""
        return 1 + self.subtracts_reference


FROM_SCRATCH = SearchConstants()
"""Of models that begin with random weights."""
PRETRAINED = SearchConstants(
    # They learn a small pool by heart within few passes, so that further ones are worth less.
    share_per_pass=1 / 6,
    # How long they are trained matters less to them than on what. Measured on instruct-small.
    share_for_min_search=3.0,
    # Their shortest trials mislead most: they hide what will be learned by heart.
    rung_budget_shares=((1.0,), (0.5, 0.5), (0.4, 0.3, 0.3)),
    # They make twice the passes: the shorter a trial, the less it learns by heart.
    data_factor=1 / 2,
    # What is worth keeping is then gone over some three times, which costs nothing yet, and on a part of the data what
    # is left out would be missing. Of 900 examples the best fifth is 0.16 to 0.24 nats ahead of the pool in ten steps
    # on all of it, as it is in the end, and hardly or not in ten steps on a seventh. Measured on compare-language.
    full_data_max_passes=2.5,
    shares_data_when_deciding=False,
    # Then the target model tells sources apart. Measured on instruct-small.
    theta_min_steps=8,
    # They find some examples easier than others, whatever these are good for. What a model trained on the pool finds
    # easy is taken out, as the penalty takes out what can be reached.
    subtracts_reference=True,
)
"""Of models that begin with pretrained weights."""


def constants_of(task: Task) -> SearchConstants:
    """The constants that hold for the models of a task."""
    return PRETRAINED if task.pretrained else FROM_SCRATCH
