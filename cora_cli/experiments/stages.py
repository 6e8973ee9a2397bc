"""Turns a grid with `sweep` and `confirm` into the rows that run next, from the results that are there.

First each method's sweep chooses a learning rate; then the methods are trained at it with fresh seeds, one more for each method whose
verdict is undecided. All decisions follow from files, so a killed grid goes on where it was.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cora_cli.experiments.estimate import Estimate
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.rows import Row, short
from cora_cli.experiments.screen import duration
from cora_cli.experiments.stage_rules import FEWEST_SEEDS
from cora_cli.experiments.steps import Kind, Plan, make_plan
from cora_cli.experiments.sweep import Sweep, SweepRule, beyond, sweep
from cora_cli.settings import DtypeName

SeedsWanted = Callable[[Path, Collection[str]], Mapping[tuple[object, ...], int]]
"""How many seeds each method needs for its next verdict, by `Row.method`, from the results in a grid's directory and the measures that
decide. A method without comparisons is left out and gets every seed."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the grid: its rows at the planned learning rates, and the state of its sweep."""

    rows: tuple[Row, ...]
    sweep: Sweep | None
    learning_rate: float | None

    @property
    def key(self) -> tuple[object, ...]:
        """See `Row.method`."""
        return self.rows[0].method


class Stages:
    """The stages of one grid in one output directory."""

    def __init__(self, grid: Grid, out: Path, inputs: Inputs, device: str, dtype: DtypeName) -> None:
        self._grid, self._out, self._inputs, self._device, self._dtype = grid, out, inputs, device, dtype

    def methods(self) -> list[Method]:
        """The methods, with what their sweeps have measured."""
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in self._grid.rows:
            if row.train is not None:
                groups.setdefault(row.method, []).append(row)
        rule = self._grid.sweep
        if rule is None:
            return [Method(tuple(rows), None, rows[0].learning_rate) for rows in groups.values()]
        candidates = [
            rows[0].at(rate, seed, "sweep")
            for rows in groups.values()
            for rate in dict.fromkeys([*_rates(rows), *_edges(_rates(rows))])
            for seed in rule.seeds
        ]
        # All rows in one plan: the rank of a shared basis depends on all of them.
        plan = self.plan([*self._untrained(), *candidates])
        return [self._swept(tuple(rows), rule, plan) for rows in groups.values()]

    def _swept(self, rows: tuple[Row, ...], rule: SweepRule, plan: Plan) -> Method:
        first, ledger = rows[0], Ledger(self._out)
        total = _total(first)

        def loss(rate: float, stop: int) -> float | None:
            found = []
            for seed in rule.seeds:
                step = plan.of_kind(first.at(rate, seed, "sweep").name, "train")
                assert step is not None
                found.append(ledger.validation_loss(step, stop if stop < total else None, plan.steps))
            known = [value for value in found if value is not None]
            return float(np.mean(known)) if len(known) == len(found) else None

        state = sweep(_rates(rows), total, rule, loss)
        return Method(rows, state, state.chosen)

    def plan(self, rows: Sequence[Row]) -> Plan:
        """The plan of these rows, at least one of every method."""
        grid = dataclasses.replace(self._grid, rows=tuple(rows))
        return make_plan(grid, self._out, self._inputs, self._device, self._dtype)

    def rows(self, methods: Sequence[Method], seeds: Mapping[tuple[object, ...], int]) -> list[Row]:
        """Every row that has run or runs next; `seeds` has the number of confirming seeds by method, for methods not to have all."""
        found = self._untrained()
        for method in methods:
            found += self._sweep_rows(method)
        if all(method.learning_rate is not None or _lost(method) for method in methods):
            for method in methods:
                found += self._confirm_rows(method, seeds)
        return found

    def _untrained(self) -> list[Row]:
        return [row for row in self._grid.rows if row.train is None]

    def _sweep_rows(self, method: Method) -> list[Row]:
        if method.sweep is None or self._grid.sweep is None:
            return []
        found, total = [], _total(method.rows[0])
        for rate in method.sweep.rates:
            stops = [*method.sweep.losses[rate], *(step for other, step in method.sweep.pending if other == rate)]
            stop = max(stops) if stops else 0
            if stop:
                stop_at = stop if stop < total else None
                found += [method.rows[0].at(rate, seed, "sweep", stop_at) for seed in self._grid.sweep.seeds]
        return found

    def _confirm_rows(self, method: Method, seeds: Mapping[tuple[object, ...], int]) -> list[Row]:
        rule = self._grid.confirm
        if rule is None or method.learning_rate is None:
            return []
        count = min(seeds.get(method.key, len(rule.seeds)), len(rule.seeds))
        return [method.rows[0].at(method.learning_rate, seed, "confirm") for seed in rule.seeds[:count]]


def to_run(rows: Sequence[Row], methods: Sequence[Method]) -> list[str]:
    """The names of the rows without those whose training diverged: it would diverge again."""
    lost = {
        (method.key, rate)
        for method in methods
        if method.sweep is not None
        for rate, losses in method.sweep.losses.items()
        if math.inf in losses.values()
    }
    return [row.name for row in rows if row.stage != "sweep" or (row.method, row.learning_rate) not in lost]


def stage_record(methods: Sequence[Method], grid: Grid) -> dict[str, Any]:
    """What `plan.json` says of the stages: each method's sweep, and the number of looks at the confirming seeds."""
    looks = len(grid.confirm.seeds) - FEWEST_SEEDS + 1 if grid.confirm is not None else None
    sweeps = [
        {
            "method": list(method.key),
            "planned": list(state.planned),
            "losses": {
                repr(rate): {str(step): loss if math.isfinite(loss) else None for step, loss in state.losses[rate].items()}
                for rate in state.rates
            },
            "dropped": {repr(rate): step for rate, step in state.dropped.items()},
            "chosen": state.chosen,
            "added": state.added,
        }
        for method in methods
        if (state := method.sweep) is not None
    ]
    return {"looks": looks, "sweeps": sweeps}


def news(methods: Sequence[Method], before: Sequence[Method]) -> list[str]:
    """A sentence for each method whose sweep has ended or was widened since `before`."""
    earlier = {method.key: method.sweep for method in before}
    found = []
    for method in methods:
        state, old = method.sweep, earlier.get(method.key)
        if state is None:
            continue
        name = method.rows[0].label
        if state.added is not None and (old is None or old.added is None):
            side = "highest" if state.added > max(state.planned) else "lowest"
            found.append(f"{name}: the best learning rate is the {side} of its sweep, so {short(state.added)} is tried as well")
        if state.chosen is not None and (old is None or old.chosen is None):
            edge = ", still at the edge of its sweep" if state.at_edge else ""
            found.append(f"{name}: learning rate {short(state.chosen)} chosen{edge}")
        elif _lost(method) and (old is None or old.pending):
            found.append(f"{name}: training diverged at every learning rate of its sweep")
    return found


def stage_lines(grid: Grid, methods: Sequence[Method], plan: Plan, estimates: Mapping[str, Estimate]) -> list[str]:
    """The rungs, and the most and the likely number of runs with their time; `plan` has one complete run of each method."""
    confirm = grid.confirm
    assert confirm is not None
    lines = []
    most, likely = _Work(), _Work()
    middle = math.ceil((FEWEST_SEEDS + len(confirm.seeds)) / 2)
    for method in methods:
        training, scoring = (_seconds(plan, estimates, method.rows[0], kind) for kind in _EACH_RUN)
        complete = None if training is None or scoring is None else training + scoring
        if grid.sweep is not None:
            total, count = _total(method.rows[0]), len(grid.sweep.seeds)
            rungs = grid.sweep.steps(total)
            most.add(count * (len(method.rows) + grid.sweep.widen), rungs[-1] / total, training)
            likely.add(count * len(method.rows), _likely_share(len(method.rows), rungs, total), training)
        most.add(len(confirm.seeds), 1, complete)
        likely.add(middle, 1, complete)
    if grid.sweep is not None:
        every = sorted({grid.sweep.steps(_total(method.rows[0])) for method in methods})
        shown = "; ".join(_listed(steps) for steps in every)
        lines.append(
            f"sweep: at steps {shown} the worse half of the learning rates is dropped (seeds {_listed(grid.sweep.seeds)})"
        )
    lines.append(
        f"confirm: {FEWEST_SEEDS} to {len(confirm.seeds)} seeds of each method ({_listed(confirm.seeds)}), until its verdict on "
        f"{', '.join(confirm.measures)} is not undecided"
    )
    lines.append(
        f"at most {most.runs} training runs, {most.time()}; likely {likely.runs}, {likely.time()}, if every rung drops half, no sweep is "
        f"widened and {middle} seeds decide"
    )
    return lines


_EACH_RUN: tuple[Kind, ...] = ("train", "evaluate")


@dataclasses.dataclass
class _Work:
    """Training runs and their time, None if it is unknown."""

    runs: int = 0
    seconds: float | None = 0.0

    def add(self, runs: int, share: float, seconds: float | None) -> None:
        """Add `runs` of which each takes a `share` of `seconds`."""
        self.runs += runs
        self.seconds = None if self.seconds is None or seconds is None else self.seconds + runs * share * seconds

    def time(self) -> str:
        """The time in words."""
        return "unknown time" if self.seconds is None else f"about {duration(self.seconds)}"


def _likely_share(rates: int, rungs: Sequence[int], total: int) -> float:
    """The share of a complete run that each of these rates gets on average if every rung drops half of them."""
    steps, left, before = 0, rates, 0
    for rung in rungs:
        steps += left * (rung - before)
        left, before = math.ceil(left / 2), rung
        if left == 1:
            break
    return steps / total / rates


def _seconds(plan: Plan, estimates: Mapping[str, Estimate], row: Row, kind: Kind) -> float | None:
    """The estimated time of a row's step; 0 if it has no such step, None if it is unknown."""
    step = plan.of_kind(row.name, kind)
    if step is None:
        return 0.0
    return estimates[step.name].seconds if step.name in estimates else None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _rates(rows: Sequence[Row]) -> list[float]:
    return [row.learning_rate for row in rows if row.learning_rate is not None]


def _edges(rates: Sequence[float]) -> list[float]:
    """The rates by which a sweep over `rates` may be widened."""
    found = [beyond(sorted(rates), edge) for edge in (min(rates), max(rates))]
    return [rate for rate in found if rate is not None]


def _total(row: Row) -> int:
    steps: int = (row.train or {})["max_steps"]
    return steps


def _lost(method: Method) -> bool:
    """Whether every learning rate of the method diverged."""
    return method.sweep is not None and not method.sweep.pending and method.sweep.chosen is None
