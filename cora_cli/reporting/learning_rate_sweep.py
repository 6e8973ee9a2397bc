"""Chooses each method's learning rate from its sweep, by the lowest validation loss (held-out loss where a run has none)."""

from collections.abc import Sequence

import numpy as np

from cora_cli.reporting.measures import LOSS
from cora_cli.reporting.statistics import MethodResults

VALIDATION, HELD_OUT = "validation loss", "held-out loss"


def choose_learning_rates(methods: Sequence[MethodResults]) -> tuple[list[MethodResults], str | None]:
    """For each method trained at several learning rates, choose the rate with the lowest loss (mean over seeds).

    The loss is the validation loss if every run of the sweep has one, else the held-out loss. Returns the chosen methods, and VALIDATION
    or HELD_OUT, or None if there was nothing to choose. If the held-out loss is missing as well, all rates are kept.
    """
    rates: dict[tuple[object, ...], list[MethodResults]] = {}
    for method in methods:
        rates.setdefault(method.identity, []).append(method)
    swept = [method for candidates in rates.values() if len(candidates) > 1 for method in candidates]
    validated = all(result.validation_loss is not None for method in swept for result in method.results)
    chosen, any_choice = [], False
    for candidates in rates.values():
        losses = {index: loss for index, one in enumerate(candidates) if (loss := _selection_loss(one, validated)) is not None}
        if len(candidates) > 1 and len(losses) == len(candidates):
            any_choice = True
            chosen.append(candidates[min(losses, key=losses.__getitem__)])
        else:
            chosen += candidates
    return chosen, (VALIDATION if validated else HELD_OUT) if any_choice else None


def _selection_loss(method: MethodResults, validated: bool) -> float | None:
    if validated:
        losses = [loss for result in method.results if (loss := result.validation_loss) is not None]
        return float(np.mean(losses)) if losses else None
    estimate = method.estimate(LOSS)
    return estimate.value if estimate else None


def at_edge(method: MethodResults, methods: Sequence[MethodResults]) -> bool:
    """Whether the method's learning rate is the lowest or the highest of its sweep; `methods` holds all rates of the sweep."""
    rates = [other.first.row.learning_rate or 0.0 for other in methods if other.identity == method.identity]
    return len(rates) > 1 and method.first.row.learning_rate in (min(rates), max(rates))


def swept_alike(one: MethodResults, other: MethodResults, methods: Sequence[MethodResults]) -> bool:
    """Whether the learning rates of two methods were chosen with equal care; `methods` holds all rates of all sweeps.

    They were if both methods have the same several rates, or equally many with the chosen rate inside its range on both sides, since
    methods of different scale need different ranges. A base model has no rate to choose.
    """
    first, second = (
        {method.first.row.learning_rate for method in methods if method.identity == side.identity} for side in (one, other)
    )
    if None in (one.first.row.learning_rate, other.first.row.learning_rate):
        return True
    inside = not at_edge(one, methods) and not at_edge(other, methods)
    return len(first) > 1 and (first == second or (len(first) == len(second) and inside))
