"""Turns the differences of one family of tests into the words better, worse, equivalent and undecided, by one rule.

It also projects how many more seeds or records would decide, from the components of variance.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.reporting.statistics import LEVEL, SEEDS, Difference, higher_is_better, holm

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"
FEW_SEEDS = f"fewer than {MIN_SEEDS} seeds"
_LAST_LOOK = 0.6
_MOST_SEEDS, _MOST_RECORDS = 50, 10_000
"""Projections beyond these totals are not worth printing."""


@dataclasses.dataclass(frozen=True)
class Test:
    """One measure of one comparison with its outcome.

    `p_holm` is corrected over the tests of the family, None without a p-value. `margin` is the largest difference that counts as none, or
    None if it is unknown. `of_rates` is the obstacle that the learning rates are (`learning_rate_sweep.rate_obstacle`), or empty. `obstacle` has all
    of them: FEW_SEEDS, that of the rates, both, or none. `more_seeds` (per method) and `more_records` would each decide an
    undecided test if the difference stayed as it is; None where neither more seeds nor more records would within reason.
    """

    measure: str
    found: Difference
    p_holm: float | None
    margin: float | None
    outcome: str
    obstacle: str
    more_seeds: int | None
    more_records: int | None
    of_rates: str


def level_at(seeds: int | None, looks: int | None) -> float:
    """The level of a test after `seeds` seeds where a grid looks `looks` times, after MIN_SEEDS seeds and after each further one.

    The levels of all looks add up to LEVEL, six tenths of it at the last one, so that the chance of an error at any look is at most
    LEVEL, however the looks depend on each other (Bonferroni).
    """
    if looks is None or looks <= 1 or seeds is None:
        return LEVEL
    last = seeds >= MIN_SEEDS + looks - 1
    return _LAST_LOOK * LEVEL if last else (1 - _LAST_LOOK) * LEVEL / (looks - 1)


def decide(planned: Sequence[tuple[str, Difference, float | None, str]], looks: int | None = None) -> list[Test]:
    """The tests of one family: (measure, difference, margin, the obstacle that the learning rates are, or "") each.

    `looks` is the number of times that a grid looks at its confirming seeds, None if all seeds were planned at once.
    """
    levels = [level_at(found.fewest_seeds, looks) for _, found, _, _ in planned]
    scaled = [
        min(1.0, found.p_value * LEVEL / level)
        for (_, found, _, _), level in zip(planned, levels, strict=True)
        if found.p_value is not None
    ]
    corrected = iter(holm(scaled))
    tests = []
    for (measure, found, margin, of_rates), level in zip(planned, levels, strict=True):
        p_holm = None if found.p_value is None else next(corrected)
        few = found.fewest_seeds is not None and found.fewest_seeds < MIN_SEEDS
        obstacle = " and ".join(filter(None, (FEW_SEEDS if few else "", of_rates)))
        outcome = UNDECIDED if obstacle else _outcome(measure, found, p_holm, margin, level)
        more: tuple[int | None, int | None] = (None, None)
        if outcome == UNDECIDED and not of_rates:
            more = needed(found, margin, len(scaled), looks)
        tests.append(Test(measure, found, p_holm, margin, outcome, obstacle, *more, of_rates))
    return tests


def _outcome(measure: str, found: Difference, p_holm: float | None, margin: float | None, level: float) -> str:
    if p_holm is not None and p_holm < LEVEL:
        return BETTER if (found.difference > 0) == higher_is_better(measure) else WORSE
    inner = found.interval(1 - 2 * level) if margin is not None else None
    if margin is not None and inner is not None and -margin < inner[0] and inner[1] < margin:
        return EQUIVALENT
    return UNDECIDED


def needed(found: Difference, margin: float | None, tests: int, looks: int | None = None) -> tuple[int | None, int | None]:
    """About how many more seeds per method, and how many more records, would each decide; None where they would not within reason.

    The components of variance and the difference stay as estimated, and the tests are those of `decide`; Holm's correction counts as
    Bonferroni's over `tests`.
    """
    seeds = found.fewest_seeds
    if found.kind != SEEDS or seeds is None or seeds < 2 or found.model is None:
        return None, None
    by_seeds = np.arange(max(seeds + 1, MIN_SEEDS), _MOST_SEEDS + 1)
    by_records = np.unique(np.ceil(found.n * 1.1 ** np.arange(1, 60)).astype(int))
    by_records = by_records[by_records <= _MOST_RECORDS] if seeds >= MIN_SEEDS else by_records[:0]
    all_seeds = np.concatenate([by_seeds, np.full(len(by_records), seeds)])
    all_records = np.concatenate([np.full(len(by_seeds), found.n), by_records])
    larger = found.model.enlarged((seeds, all_seeds), (found.n, all_records))
    levels = np.array([level_at(int(count), looks) for count in all_seeds])
    decided = larger.p_value() * tests < levels
    if margin is not None and abs(found.difference) < margin:
        decided |= ~larger.covered(margin, 1 - 2 * levels) & ~larger.covered(-margin, 1 - 2 * levels)
    enough_seeds, enough_records = np.split(decided, [len(by_seeds)])
    return _first(by_seeds[enough_seeds] - seeds), _first(by_records[enough_records] - found.n)


def _first(counts: NDArray[np.int_]) -> int | None:
    return int(counts[0]) if len(counts) else None
