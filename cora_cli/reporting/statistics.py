"""Groups rows that differ only by seed into methods, and computes their intervals, differences and Holm's correction.

All inference is that of `crossed`: seeds and records are both random. `outcomes` turns the numbers into words.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from cora_cli.crossed import Crossed, Floats, crossed, pseudo_values, stacked
from cora_cli.errors import CoraError
from cora_cli.evaluation.metrics import LOWER_IS_BETTER
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.intervals import Interval
from cora_cli.reporting.measures import LOSS, Measure, value_function
from cora_cli.reporting.results import Result

LEVEL = 0.05
"""Differences with a corrected p-value below this level count as shown."""
SEEDS, EXAMPLES = "seeds and records", "records only"
_AT_ONCE = 1024
"""Intervals computed together, which bounds the memory."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. `kind` is SEEDS or EXAMPLES, `n` the examples, `seeds` the number of runs.

    Both ends are None where there is no interval, as for a single example.
    """

    value: float
    ci95: Interval
    kind: str
    n: int
    seeds: int

    @property
    def low(self) -> float:
        """The lower end, or the value without an interval."""
        return self.ci95[0] if self.ci95 else self.value

    @property
    def high(self) -> float:
        """The upper end, or the value without an interval."""
        return self.ci95[1] if self.ci95 else self.value

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between two methods in one measure, over `n` records.

    `seeds` has the number of seeds of both sides, None for a side without seeds, such as a base model. `paired` says whether they are the
    same seeds. `finished` has the number of seeds of both methods before pairing. `kind` is SEEDS, or EXAMPLES if some side has one seed, so that the intervals exclude the spread over seeds and there is no
    p-value. The parts of the variance of the difference are those that more seeds, more records, or either reduce. `model` is the fit
    behind the intervals.
    """

    difference: float
    p_value: float | None
    kind: str
    n: int
    seeds: tuple[int | None, int | None]
    paired: bool
    seed_variance: float
    record_variance: float
    interaction_variance: float
    finished: tuple[int | None, int | None]
    model: Crossed | None = None
    _intervals: dict[float, Interval] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def interval(self, confidence: float) -> Interval:
        """The interval at this confidence; None where there is none."""
        if confidence not in self._intervals:
            compute_intervals([self], confidence)
        return self._intervals[confidence]

    @property
    def ci95(self) -> Interval:
        """The 95 % interval."""
        return self.interval(0.95)

    @property
    def ci90(self) -> Interval:
        """The 90 % interval, which decides about equivalence."""
        return self.interval(0.90)

    @property
    def fewest_seeds(self) -> int | None:
        """The smaller number of seeds, or None if neither side has seeds."""
        known = [count for count in self.seeds if count is not None]
        return min(known) if known else None


@dataclasses.dataclass(frozen=True, eq=False)
class MethodResults:
    """Results that differ only by seed, sorted by seed."""

    results: tuple[Result, ...]
    _estimates: dict[str, Estimate | None] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def first(self) -> Result:
        """The first result, for the settings that all results share."""
        return self.results[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the runs that finished."""
        return tuple(result.row.seed for result in self.results)

    @functools.cached_property
    def identity(self) -> tuple[object, ...]:
        """The settings that identify a method, without its learning rate."""
        return self.first.row.identity

    @property
    def planned_as(self) -> tuple[object, ...]:
        """What identifies the method in a grid's plan."""
        return self.identity[:6]

    @property
    def name(self) -> str:
        """The label with rank and number of models, unless it contains them already: `fb r=48 n=5`."""
        row = self.first.row
        parts = [row.label]
        for symbol, count in (("r", row.rank), ("n", row.n_models)):
            # A setting such as gradient_accumulation=2 does not state a number of models.
            if count is not None and not re.search(rf"(?<!\w){symbol}={count}(?!\d)", row.label):
                parts.append(f"{symbol}={count}")
        return " ".join(parts)

    def with_measure(self, name: str) -> tuple[Result, ...]:
        """The results that have the measure `name`."""
        return tuple(result for result in self.results if name in result.measures)

    def repeats(self, name: str) -> tuple[Result, ...]:
        """The results that are different runs: all with the measure, or one where no seed changes the model."""
        measured = self.with_measure(name)
        fixed = self.first.row.run is None and self.first.row.mode == "base"
        return measured[:1] if fixed or all(result.untrained for result in measured) else measured

    def has_seeds(self) -> bool:
        """Whether training depends on a seed. It does not for a base model and for a method that cannot train."""
        base = self.first.row.run is None and self.first.row.mode == "base"
        return not base and not all(result.untrained for result in self.results)

    def estimate(self, name: str) -> Estimate | None:
        """Mean and 95 % interval of a measure, or None if no seed has it.

        Several seeds are crossed with the records. One run keeps its recorded bootstrap interval over records. Tables, plots and every
        comparison ask for it, so it is computed once.
        """
        if name not in self._estimates:
            compute_estimates([self], [name])
        return self._estimates[name]


def compute_estimates(methods: Sequence[MethodResults], names: Sequence[str]) -> None:
    """Compute the estimates of all methods in all measures together, which takes far less time than one after another."""
    several: list[tuple[MethodResults, str, list[Measure]]] = []
    for method, name in itertools.product(methods, names):
        measures = [result.measures[name] for result in method.repeats(name)]
        if len(measures) > 1:
            several.append((method, name, measures))
        elif measures:
            only, runs = measures[0], len(method.with_measure(name))
            method._estimates[name] = Estimate(only.value, only.ci95, EXAMPLES, only.n, runs)
        else:
            method._estimates[name] = None
    models = [_model([_contributions(measures, name)]) if measures[0].n > 1 else None for _, name, measures in several]
    for (method, name, measures), interval in zip(several, _intervals(models, 0.95), strict=True):
        value = float(np.mean([measure.value for measure in measures]))
        method._estimates[name] = Estimate(value, interval, SEEDS, measures[0].n, len(method.with_measure(name)))


def group_methods(results: Sequence[Result]) -> list[MethodResults]:
    """Methods in the order of their first rows. Raises `CoraError` if two rows have the same settings and the same seed, or if the
    rows of one method were trained with other settings.
    """
    found: dict[tuple[object, ...], list[Result]] = {}
    first: dict[tuple[object, ...], Result] = {}
    for result in results:
        identity = MethodResults((result,)).identity
        _check_trained_alike(first.setdefault(identity, result), result)
        found.setdefault((*identity, result.row.learning_rate), []).append(result)
    methods = []
    for members in found.values():
        members.sort(key=lambda result: result.row.seed)
        for one, other in itertools.pairwise(members):
            if one.row.seed == other.row.seed:
                raise CoraError(
                    f"{one.row.name} and {other.row.name} are the same method with the same seed {one.row.seed}, so they would count "
                    "twice; report one of them, or in a grid give them different labels"
                )
        methods.append(MethodResults(tuple(members)))
    return methods


def _check_trained_alike(one: Result, other: Result) -> None:
    """Raise `CoraError` if two runs of a grid that have one label differ in more than learning rate and seed.

    Grids of earlier versions could hold such rows. A setting that only one run records came with a later version.
    """
    settings, others = (_settings(result) for result in (one, other))
    differing = sorted(key for key in settings.keys() & others.keys() if settings[key] != others[key])
    if differing:
        raise CoraError(
            f"{one.row.name} and {other.row.name} have one label, {one.row.label!r}, but were trained with different {', '.join(differing)}, "
            "so they are no seeds of one method; give them different labels in the grid file and run `cora ablate` again, which keeps "
            "their training"
        )


def _settings(result: Result) -> dict[str, object]:
    fingerprint, plan = result.record.get("fingerprint", {}), result.record.get("plan") or {}
    inputs = {key: value for key, value in fingerprint.items() if key != "settings"}
    settings = {**fingerprint.get("settings", {}), "alpha": plan.get("alpha"), **inputs}
    return {key: value for key, value in settings.items() if key not in ("learning_rate", "seed")}


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
    return name != LOSS and name not in LOWER_IS_BETTER


def compare(one: MethodResults, other: MethodResults, name: str) -> Difference | None:
    """`one` minus `other` in one measure; None if either method lacks it.

    The methods are paired over the seeds that both have if these are all seeds or at least MIN_SEEDS. Otherwise each side keeps all its
    seeds and has its own seed variance. A side without seeds is subtracted from every seed of the other.
    """
    sides = [{result.row.seed: result.measures[name] for result in method.repeats(name)} for method in (one, other)]
    if not all(sides):
        return None
    seeded = (one.has_seeds(), other.has_seeds())
    shared = sorted(sides[0].keys() & sides[1].keys())
    paired = not all(seeded) or len(shared) >= MIN_SEEDS or sides[0].keys() == sides[1].keys()
    finished = [len(side) if has else None for side, has in zip(sides, seeded, strict=True)]
    if all(seeded) and paired:
        sides = [{seed: side[seed] for seed in shared} for side in sides]
    measures = [[side[seed] for seed in sorted(side)] for side in sides]
    counts = [len(side) if has else None for side, has in zip(sides, seeded, strict=True)]
    known = [count for count in counts if count is not None]
    kind = EXAMPLES if known and min(known) < 2 else SEEDS
    n = measures[0][0].n
    first, second = (_contributions(side, name) for side in measures)
    found = None
    if n > 1:
        found = _model([first - second] if paired else [first, second], (first, second))
    return Difference(
        float(first.mean() - second.mean()),
        float(found.p_value()) if found is not None and kind == SEEDS else None,
        kind,
        n,
        (counts[0], counts[1]),
        paired,
        *((float(found.seed), float(found.record), float(found.interaction)) if found is not None else (0.0, 0.0, 0.0)),
        finished=(finished[0], finished[1]),
        model=found,
    )


def _contributions(measures: Sequence[Measure], name: str) -> Floats:
    return np.stack([pseudo_values(measure.statistics, value_function(name)) for measure in measures])


def _model(sides: Sequence[Floats], contributions: Sequence[Floats] | None = None) -> Crossed | None:
    """The fit to the `sides` of `crossed`, or None where nothing varies but rounding of the `contributions`: then nothing can be inferred."""
    found = crossed(sides)
    scale = max(float(np.abs(values).max()) for values in contributions or sides)
    return None if float(found.variance) <= (1e-13 * scale) ** 2 else found


def compute_intervals(differences: Sequence[Difference], confidence: float) -> None:
    """Compute the intervals of all differences together, which takes far less time than one after another."""
    for one, interval in zip(differences, _intervals([one.model for one in differences], confidence), strict=True):
        one._intervals[confidence] = interval


def _intervals(models: Sequence[Crossed | None], confidence: float) -> list[Interval]:
    ends: list[tuple[float, float]] = []
    known = [model for model in models if model is not None]
    for start in range(0, len(known), _AT_ONCE):
        low, high = stacked(known[start : start + _AT_ONCE]).interval(confidence)
        ends += zip(low.tolist(), high.tolist(), strict=True)
    found = iter(ends)
    return [None if model is None or math.isnan((pair := next(found))[0]) else pair for model in models]
