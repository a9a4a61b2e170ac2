"""Which method is best at each budget, in words that cannot be misread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cads.study.analysis.points import (
    SLACK,
    BudgetLevel,
    MethodPoint,
    best_of,
    budgets_of,
    complete,
    differs_significantly,
    interval_text,
    within_budget,
)

MOST_NAMED = 6
"""Methods that a sentence names; the others are counted."""
BEATS, LEVEL, FREE_IS_BEST, NO_FREE = "beats", "level", "free", "no free"
"""How the best method compares with what is free: beats it; cannot be told apart; is itself free; nothing free ran."""


@dataclass(frozen=True)
class BudgetVerdict:
    """The best method at one budget.

    Attributes:
        budget: as given. flops: the budget.
        best: the best affordable point, of those with all seeds.
        level: other affordable methods that do not differ significantly from it.
        best_free: the best affordable point that is free; None if there is none.
        outcome: `BEATS`, `LEVEL`, `FREE_IS_BEST` or `NO_FREE`.
        sentence: the same in words.
    """

    budget: str
    flops: float
    best: MethodPoint
    level: tuple[str, ...]
    best_free: MethodPoint | None
    outcome: str
    sentence: str


def shown_name(method: str) -> str:
    """The name of a method in sentences and figures, without a comma: "search, all in" is "search (all in)"."""
    first, *others = (part.strip() for part in method.split(","))
    return f"{first} ({'; '.join(others)})" if others else first


def quoted_name(method: str) -> str:
    """The name of a method in a sentence: in quotes if it has several words, which would be read with the sentence."""
    name = shown_name(method)
    return f'"{name}"' if " " in name else name


def answers(points: Sequence[MethodPoint]) -> list[BudgetVerdict]:
    """For each budget of a group, the best method at that total cost."""
    verdicts = []
    for limit in budgets_of(points):
        rivals = within_budget(points, limit)
        if not rivals:
            continue
        ranked = complete(rivals)
        best = best_of(ranked)
        others = sorted(ranked, key=lambda p: -p.mean if p.maximised else p.mean)
        level = tuple(p.method for p in others if p is not best and differs_significantly(best, p) is False)
        free = [p for p in ranked if p.free]
        best_free = best_of(free) if free else None
        outcome = _outcome(best, level, best_free)
        incomplete = [f"{quoted_name(p.method)} ({len(p.seeds)} of {len(best.seeds)} seeds)" for p in rivals]
        left_out = [text for text, p in zip(incomplete, rivals, strict=True) if p not in ranked]
        sentence = " ".join([*_sentences(limit, best, level, best_free, outcome), *_left_out(left_out)])
        verdicts.append(BudgetVerdict(limit.budget, limit.flops, best, level, best_free, outcome, sentence))
    return verdicts


def headline(verdicts: Sequence[BudgetVerdict]) -> str:
    """What the verdicts on all budgets come to, in a few sentences."""
    if not verdicts:
        return ""
    if len(verdicts[0].best.seeds) < 2:
        return "One seed was run: differences may be chance. " + _named_best(verdicts)
    if all(v.outcome == NO_FREE for v in verdicts):
        return f"Nothing free was run to compare with. {_named_best(verdicts)}"
    by_outcome: dict[str, dict[str, list[str]]] = {}
    for v in verdicts:
        by_outcome.setdefault(v.outcome, {}).setdefault(quoted_name(v.best.method), []).append(_budget(v.budget))
    if len(verdicts) > 1:
        everywhere = ["both budgets" if len(verdicts) == 2 else f"all {len(verdicts)} budgets"]
        by_outcome = {
            outcome: {name: everywhere if len(budgets) == len(verdicts) else budgets for name, budgets in names.items()}
            for outcome, names in by_outcome.items()
        }
    sentences = [
        f"{name} beats everything that is free at {_and(budgets)}."
        for name, budgets in by_outcome.get(BEATS, {}).items()
    ]
    for name, budgets in by_outcome.get(LEVEL, {}).items():
        sentences.append(f"{name} has the best mean at {_and(budgets)}, and cannot be told apart from what is free.")
    for name, budgets in by_outcome.get(FREE_IS_BEST, {}).items():
        sentences.append(f"At {_and(budgets)} {name}, which is free, has the best mean.")
    for name, budgets in by_outcome.get(NO_FREE, {}).items():
        sentences.append(f"At {_and(budgets)} {name} has the best mean; nothing free fits that budget.")
    return " ".join(sentences)


def _named_best(verdicts: Sequence[BudgetVerdict]) -> str:
    best: Mapping[str, list[str]] = {name: [] for name in dict.fromkeys(v.best.method for v in verdicts)}
    for v in verdicts:
        best[v.best.method].append(_budget(v.budget))
    parts = [f"{quoted_name(name)} at {_and(budgets)}" for name, budgets in best.items()]
    return f"Best by the mean: {'; '.join(parts)}."


def _outcome(best: MethodPoint, level: Sequence[str], best_free: MethodPoint | None) -> str:
    if best_free is None:
        return NO_FREE
    if best.free:
        return FREE_IS_BEST
    return LEVEL if best_free.method in level else BEATS


def _sentences(
    limit: BudgetLevel, best: MethodPoint, level: Sequence[str], best_free: MethodPoint | None, outcome: str
) -> list[str]:
    name, seeds = quoted_name(best.method), len(best.seeds)
    flops = f"{limit.flops:.3g} FLOPs in all"
    where = flops if limit.budget.endswith("FLOPs") else f"{_budget(limit.budget)} ({flops})"
    # A run that paid for selection on top of its budget fits only into a larger budget than its own.
    smaller = f" (run with {_budget(best.budget)})" if best.budget_flops < limit.on(best.seeds) / SLACK else ""
    first = f"At {where} {name}{smaller} has the best mean: {best.metric} {interval_text(best)}."
    sentences = [first]
    if level:
        sentences.append(f"By {seeds} seeds it cannot be told apart from {_or([quoted_name(m) for m in level])}.")
    if seeds < 2:
        sentences.append("One seed: the difference may be chance.")
    if outcome == FREE_IS_BEST:
        sentences.append("It is free.")
    elif best_free is not None:
        sentences.append(f"The best that is free: {quoted_name(best_free.method)}, {interval_text(best_free)}.")
    return sentences


def _left_out(incomplete: Sequence[str]) -> list[str]:
    return [f"Not compared: {'; '.join(incomplete)}."] if incomplete else []


def _budget(text: str) -> str:
    return text.removesuffix("s") if text.startswith("1 ") else text


def _or(names: Sequence[str]) -> str:
    shown = list(names)
    if len(names) > MOST_NAMED + 1:
        shown = [*names[:MOST_NAMED], f"{len(names) - MOST_NAMED} others"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
