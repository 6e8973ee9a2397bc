"""Groups rows that differ only by seed into methods, and computes intervals, paired tests and Holm's correction.

`summary` collects these numbers, and `tables` and `plots` show them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from cora_cli.errors import CoraError
from cora_cli.intervals import Floats, Interval, PairedDifference, paired_difference
from cora_cli.reporting.collect import Result
from cora_cli.reporting.measures import LOSS, value_function

LEVEL = 0.05
"""Differences with a corrected p-value below this level count as supported."""
RESAMPLES = 4999
"""Resamples per paired test. `resamples_for` raises the number if many tests are corrected together."""
SEEDS, EXAMPLES = "t-interval over seeds", "bootstrap over examples"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. `kind` is SEEDS or EXAMPLES, `n` the examples, `seeds` the number of runs.

    A single example has no interval: both ends are then the value, and `has_interval` is False.
    """

    value: float
    low: float
    high: float
    kind: str
    n: int
    seeds: int

    @classmethod
    def over_examples(cls, value: float, interval: Interval, n: int, seeds: int) -> "Estimate":
        """A value with its bootstrap interval over n examples."""
        return cls(value, *(interval or (value, value)), EXAMPLES, n, seeds)

    @property
    def has_interval(self) -> bool:
        """Whether there is more than one value to take an interval from."""
        return self.kind == SEEDS or self.n > 1

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class MethodResults:
    """Results that differ only by seed, sorted by seed."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """The first result, for the settings that all results share."""
        return self.results[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that finished."""
        return tuple(result.row.seed for result in self.results)

    @property
    def identity(self) -> tuple[object, ...]:
        """The settings that identify a method, without its learning rate."""
        row = self.first.row
        return (row.group, row.label, row.printed, row.mode, row.rank, row.n_models, row.model, row.dataset)

    @property
    def name(self) -> str:
        """The label with rank and number of models, unless it contains them already: `fb r=48 n=5`."""
        row = self.first.row
        parts = [row.label]
        parts += [f"r={row.rank}"] if row.rank is not None and f"r={row.rank}" not in row.label else []
        parts += [f"n={row.n_models}"] if row.n_models is not None and f"n={row.n_models}" not in row.label else []
        return " ".join(parts)

    def with_measure(self, name: str) -> tuple[Result, ...]:
        """The results that have the measure `name`."""
        return tuple(result for result in self.results if name in result.measures)

    def estimate(self, name: str) -> Estimate | None:
        """Mean and 95 % interval of a measure, or None if no seed has it."""
        measured = self.with_measure(name)
        measures = [result.measures[name] for result in measured]
        if not measures:
            return None
        # Runs that cannot train all give the base model, so their seeds have no spread.
        if len(measures) == 1 or all(result.record.get("is_base_model") for result in measured):
            only = measures[0]
            return Estimate.over_examples(only.value, only.ci95, only.n, len(measures))
        mean, half = t_interval([measure.value for measure in measures])
        return Estimate(mean, mean - half, mean + half, SEEDS, measures[0].n, len(measures))


def group_methods(results: Sequence[Result]) -> list[MethodResults]:
    """Methods in the order of their first rows. Raises `CoraError` if two rows have the same settings and the same seed."""
    found: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        found.setdefault((*MethodResults((result,)).identity, result.row.learning_rate), []).append(result)
    methods = []
    for members in found.values():
        members.sort(key=lambda result: result.row.seed)
        for one, other in itertools.pairwise(members):
            if one.row.seed == other.row.seed:
                raise CoraError(
                    f"{one.row.name} and {other.row.name} are the same method with the same seed {one.row.seed}, so they would count "
                    "twice; report one of them, or give them different labels"
                )
        methods.append(MethodResults(tuple(members)))
    return methods


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's t-interval of k ≥ 2 values: t·s/√k with k − 1 degrees of freedom."""
    k = len(values)
    spread = float(np.std(values, ddof=1))
    return float(np.mean(values)), float(stdtrit(k - 1, (1 + confidence) / 2)) * spread / math.sqrt(k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979) in the given order: max over j ≤ i of (m − j + 1)·p₍ⱼ₎, at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def higher_is_better(name: str) -> bool:
    """Whether a higher value of the measure is better."""
    return name != LOSS


def resamples_for(tests: int) -> int:
    """Resamples for each of `tests` tests: enough for the smallest p-value, 1 / (1 + resamples), to survive Holm's correction."""
    return max(RESAMPLES, 40 * tests - 1)


def compare(
    one: MethodResults, other: MethodResults, name: str, seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference | None:
    """`one` minus `other` over the same examples; the outputs of all seeds for one example stay together.

    The compared value is the mean over seeds of the corpus values. Returns None if either method lacks the measure.
    """
    sides = [[result.measures[name].statistics for result in method.with_measure(name)] for method in (one, other)]
    if not all(sides):
        return None
    value = value_function(name)
    if name == "sacrebleu":
        # Corpus BLEU is not a function of averaged counts. Each seed is a block of columns, and both sides get equally many blocks.
        blocks = math.lcm(*map(len, sides))
        first, second = (np.hstack(side * (blocks // len(side))) for side in sides)

        def mean_over_seeds(sums: Floats, n: int) -> Floats:
            return np.asarray(value(sums.reshape(*sums.shape[:-1], blocks, -1), n).mean(axis=-1))

        return paired_difference(first, second, mean_over_seeds, resamples, seed)
    first, second = (np.mean(side, axis=0) for side in sides)
    return paired_difference(first, second, value, resamples, seed)


def best_methods(methods: Sequence[MethodResults], names: Sequence[str], seed: int = 0) -> dict[str, tuple[int, float, bool]]:
    """For each measure: the index of the best method, the largest p-value of its paired tests against every other method with the
    measure, Holm-corrected over all measures together, and whether it is better than each of them at every seed.

    Measures of fewer than two methods are left out. The best is supported if that p-value is below `LEVEL` and the seeds agree.
    """
    pairs: list[tuple[str, int, MethodResults]] = []
    places: dict[str, int] = {}
    for name in names:
        estimates = {index: estimate for index, method in enumerate(methods) if (estimate := method.estimate(name))}
        if len(estimates) > 1:
            sign = 1 if higher_is_better(name) else -1
            places[name] = max((sign * estimate.value, -index, index) for index, estimate in estimates.items())[-1]
            pairs += [(name, places[name], methods[index]) for index in estimates if index != places[name]]
    resamples = resamples_for(len(pairs))
    found = [compare(methods[place], other, name, seed, resamples) for name, place, other in pairs]
    corrected = holm([test.p_value if test else 1.0 for test in found])
    largest, agree = dict.fromkeys(places, 0.0), dict.fromkeys(places, True)
    for (name, place, other), p_holm in zip(pairs, corrected, strict=True):
        sign = 1 if higher_is_better(name) else -1
        largest[name] = max(largest[name], p_holm)
        agree[name] &= all(sign * difference > 0 for difference in differences_by_seed(methods[place], other, name))
    return {name: (place, largest[name], agree[name]) for name, place in places.items()}


def differences_by_seed(one: MethodResults, other: MethodResults, name: str) -> list[float]:
    """`one` minus `other` for every seed that both have. A base model has no seed and is compared with every seed."""
    ours, theirs = (
        {result.row.seed: result.measures[name].value for result in method.with_measure(name)} for method in (one, other)
    )
    if other.first.row.run is None:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    elif one.first.row.run is None:
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    return [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]
