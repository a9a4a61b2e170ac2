"""Verdicts in words: what beats what is free, what cannot be told apart, and names that are not read as two."""

import pytest

from cads.study.analysis.points import MethodPoint
from cads.study.analysis.verdicts import BEATS, FREE_IS_BEST, LEVEL, NO_FREE, answers, headline, shown_name


def point(method, scores, *, budget=1, selector=None, spent=0.0):
    return MethodPoint(
        task="t",
        model="",
        method=method,
        selector=selector or method,
        budget=f"{budget} epochs",
        metric="accuracy",
        maximised=True,
        seeds=tuple(range(len(scores))),
        scores=tuple(scores),
        budgets=(100.0 * budget,) * len(scores),
        selection=spent,
        spent=spent,
        train_flops=100.0 * budget - spent,
        full_flops=100.0,
        selected=0.5,
        imported=False,
    )


JOINT = point("joint", (0.80, 0.81, 0.82))
BETTER = point("cads", (0.90, 0.91, 0.92), spent=1.0)
AS_GOOD = point("cads", (0.90, 0.78, 0.82), spent=1.0)
WORSE = point("cads", (0.70, 0.71, 0.72), spent=1.0)


@pytest.mark.parametrize(
    ("points", "outcome", "words"),
    [
        ([JOINT, BETTER], BEATS, "cads beats everything that is free at 1 epoch."),
        ([JOINT, AS_GOOD], LEVEL, "cads has the best mean at 1 epoch, and cannot be told apart from what is free."),
        ([JOINT, WORSE], FREE_IS_BEST, "At 1 epoch joint, which is free, has the best mean."),
        ([BETTER, point("loss", (0.5, 0.5, 0.6), spent=1.0)], NO_FREE, "Nothing free was run to compare with."),
    ],
)
def test_the_headline_says_how_it_compares_with_what_is_free(points, outcome, words):
    (verdict,) = answers(points)
    assert verdict.outcome == outcome
    assert headline([verdict]).startswith(words)


def test_one_seed_tells_nothing_and_says_so():
    verdicts = answers([point("cads", (0.9,), spent=1.0), point("joint", (0.5,))])
    assert headline(verdicts).startswith("One seed was run: differences may be chance.")
    assert "One seed: the difference may be chance." in verdicts[0].sentence


def test_a_free_selector_that_paid_is_not_free():
    paid = point("random", (0.9, 0.91, 0.92), spent=5.0)
    assert answers([paid, WORSE])[0].outcome == NO_FREE


def test_budgets_with_one_outcome_are_said_together():
    points = [
        point(method, scores, budget=b, spent=spent)
        for b in (1, 2, 3)
        for method, scores, spent in (("joint", (0.8, 0.81), 0.0), ("cads", (0.9, 0.91), 1.0))
    ]
    assert headline(answers(points)) == "cads beats everything that is free at all 3 budgets."
    mixed = [*points[:4], point("joint", (0.95, 0.96), budget=3), point("cads", (0.9, 0.91), budget=3, spent=1.0)]
    assert headline(answers(mixed)) == (
        "cads beats everything that is free at 1 epoch and 2 epochs. "
        "At 3 epochs joint, which is free, has the best mean."
    )


def test_names_of_several_words_are_quoted():
    points = [point("joint", (0.5, 0.51, 0.52)), point("cads and target", (0.9, 0.91, 0.92), spent=1.0)]
    verdicts = answers(points)
    assert headline(verdicts) == '"cads and target" beats everything that is free at 1 epoch.'
    assert verdicts[0].sentence.startswith('At 1 epoch (100 FLOPs in all) "cads and target" has the best mean: ')


def test_many_methods_are_counted_and_a_comma_joins_no_names():
    scores = (0.9, 0.7, 0.82)
    others = [point(f"m{i}, stop", (0.8, 0.85 - i / 1000, 0.7), spent=1.0) for i in range(9)]
    sentence = answers([point("cads", scores, spent=1.0), *others])[0].sentence
    assert 'By 3 seeds it cannot be told apart from "m0 (stop)", "m1 (stop)"' in sentence
    assert "or 3 others." in sentence


@pytest.mark.parametrize(
    ("name", "shown"),
    [("cads", "cads"), ("search, all in", "search (all in)"), ("loss, a 1, b 2", "loss (a 1; b 2)")],
)
def test_names_without_commas(name, shown):
    assert shown_name(name) == shown
    assert "," not in shown_name(shown)
