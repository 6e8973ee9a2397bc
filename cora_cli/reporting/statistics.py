"""Rows that differ only by seed -> methods, with intervals, paired tests and Holm's correction.

It turns measures into estimates and decides which differences are supported; how they are shown is not its business.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from cora_cli.errors import CoraError
from cora_cli.intervals import Floats, PairedDifference, paired_difference
from cora_cli.reporting.collect import Result
from cora_cli.reporting.measures import LOSS, value_function

LEVEL = 0.05
"""Corrected p-values below it count as supported."""
RESAMPLES = 4999
"""Behind each paired test, unless so many are corrected together that none could then be significant: see `resamples_for`."""
VALIDATION, HELD_OUT = "validation loss", "held-out loss"
SEEDS, EXAMPLES = "t-interval over seeds", "bootstrap over examples"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. `kind` is SEEDS or EXAMPLES, `n` the examples, `seeds` the number of runs."""

    value: float
    low: float
    high: float
    kind: str
    n: int
    seeds: int

    @property
    def half_width(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Results that differ only by seed, in the order of their seeds."""

    results: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """Any of the results, for what they share."""
        return self.results[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that finished."""
        return tuple(result.row.seed for result in self.results)

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes a method the same at another learning rate."""
        row = self.first.row
        return (row.group, row.label, row.printed, row.mode, row.rank, row.n_models, row.model, row.dataset)

    @property
    def name(self) -> str:
        """Label with rank and number of models, unless the label has them: `fb r=48 n=5`."""
        row = self.first.row
        parts = [row.label]
        parts += [f"r={row.rank}"] if row.rank is not None and f"r={row.rank}" not in row.label else []
        parts += [f"n={row.n_models}"] if row.n_models is not None and f"n={row.n_models}" not in row.label else []
        return " ".join(parts)

    def with_measure(self, name: str) -> tuple[Result, ...]:
        """The results that have the measure."""
        return tuple(result for result in self.results if name in result.measures)

    def estimate(self, name: str) -> Estimate | None:
        """Mean and interval of a measure; None where no seed has it."""
        measured = self.with_measure(name)
        measures = [result.measures[name] for result in measured]
        if not measures:
            return None
        # Runs that cannot train are one model however many seeds they had: no spread over seeds is to be had from them.
        if len(measures) == 1 or all(result.record.get("is_base_model") for result in measured):
            only = measures[0]
            return Estimate(only.value, *only.ci95, EXAMPLES, only.n, len(measures))
        mean, half = t_interval([measure.value for measure in measures])
        return Estimate(mean, mean - half, mean + half, SEEDS, measures[0].n, len(measures))


def group_methods(results: Sequence[Result]) -> list[Method]:
    """Methods in the order of their first rows. Raises `CoraError` where two rows differ in nothing, not even in the seed."""
    found: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        found.setdefault((*Method((result,)).identity, result.row.learning_rate), []).append(result)
    methods = []
    for members in found.values():
        members.sort(key=lambda result: result.row.seed)
        for one, other in itertools.pairwise(members):
            if one.row.seed == other.row.seed:
                raise CoraError(
                    f"{one.row.name} and {other.row.name} are the same method with the same seed {one.row.seed}, so they would count "
                    "twice; report one of them, or give them different labels"
                )
        methods.append(Method(tuple(members)))
    return methods


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of Student's interval, t·s/√k with k − 1 degrees of freedom, of k ≥ 2 values."""
    k = len(values)
    spread = float(np.std(values, ddof=1))
    return float(np.mean(values)), float(stdtrit(k - 1, (1 + confidence) / 2)) * spread / math.sqrt(k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979), in the given order: max over j ≤ i of (m − j + 1)·p₍ⱼ₎, at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def higher_is_better(name: str) -> bool:
    """Whether more of the measure is better."""
    return name != LOSS


def resamples_for(tests: int) -> int:
    """Resamples of each of `tests` tests: the smallest p-value, 1 / (1 + resamples), has to survive Holm's correction."""
    return max(RESAMPLES, 40 * tests - 1)


def compare(one: Method, other: Method, name: str, seed: int = 0, resamples: int = RESAMPLES) -> PairedDifference | None:
    """`one` minus `other` over the same examples, each example's outputs of all seeds kept together.

    The measure is the mean over seeds of its corpus values. None where either lacks it.
    """
    sides = [[result.measures[name].statistics for result in method.with_measure(name)] for method in (one, other)]
    if not all(sides):
        return None
    value = value_function(name)
    if name == "sacrebleu":
        # No function of averaged counts: both sides get as many blocks of counts, each of which is a seed's.
        blocks = math.lcm(*map(len, sides))
        first, second = (np.hstack(side * (blocks // len(side))) for side in sides)

        def mean_over_seeds(sums: Floats, n: int) -> Floats:
            return np.asarray(value(sums.reshape(*sums.shape[:-1], blocks, -1), n).mean(axis=-1))

        return paired_difference(first, second, mean_over_seeds, resamples, seed)
    first, second = (np.mean(side, axis=0) for side in sides)
    return paired_difference(first, second, value, resamples, seed)


def best_methods(methods: Sequence[Method], names: Sequence[str], seed: int = 0) -> dict[str, tuple[int, float, bool]]:
    """By measure the place of the best method, the largest p-value of its paired tests against every other method that has the measure,
    Holm-corrected over all measures together, and whether it is better than each at every seed.

    Measures of fewer than two methods are left out. The best is supported where that p-value is below `LEVEL` and the seeds agree.
    """
    pairs: list[tuple[str, int, Method]] = []
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


def differences_by_seed(one: Method, other: Method, name: str) -> list[float]:
    """`one` minus `other` for every seed that both have; a base model, which has no seed, is compared with every one."""
    ours, theirs = (
        {result.row.seed: result.measures[name].value for result in method.with_measure(name)} for method in (one, other)
    )
    if other.first.row.run is None:
        theirs = dict.fromkeys(ours, next(iter(theirs.values())))
    elif one.first.row.run is None:
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    return [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]


def choose_learning_rates(methods: Sequence[Method]) -> tuple[list[Method], str | None]:
    """Of each method that was trained at several learning rates, the one with the least loss (mean over seeds).

    That is the validation loss where every run that takes part has one, else the held-out loss. Returns the methods that remain, and
    VALIDATION or HELD_OUT, None where there was no choice. Where a held-out loss is lacking too, all rates remain.
    """
    rates: dict[tuple[object, ...], list[Method]] = {}
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


def _selection_loss(method: Method, validated: bool) -> float | None:
    if validated:
        losses = [loss for result in method.results if (loss := result.validation_loss) is not None]
        return float(np.mean(losses)) if losses else None
    estimate = method.estimate(LOSS)
    return estimate.value if estimate else None


def at_edge(method: Method, methods: Sequence[Method]) -> bool:
    """Whether the method's learning rate is the least or the largest of several that it was trained at, all of them in `methods`."""
    rates = [other.first.row.learning_rate or 0.0 for other in methods if other.identity == method.identity]
    return len(rates) > 1 and method.first.row.learning_rate in (min(rates), max(rates))
