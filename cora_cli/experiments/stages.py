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

from cora_cli.experiments.grid import Grid
from cora_cli.experiments.inputs import Inputs
from cora_cli.experiments.ledger import Ledger
from cora_cli.experiments.rows import Row, short
from cora_cli.experiments.stage_rules import MIN_SEEDS, ConfirmRule
from cora_cli.experiments.steps import Plan, StepFlags, make_plan
from cora_cli.experiments.sweep import Sweep, SweepRule, beyond, sweep
from cora_cli.training.proposal import FAR, rates_around

SeedsWanted = Callable[[Path, Collection[str]], Mapping[tuple[object, ...], int]]
"""How many seeds each method needs for its next verdict, by `Row.method`, from the results in a grid's directory and the measures that
decide. A method without comparisons is left out and gets every seed."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the grid: its rows at the planned learning rates, and the state of its sweep.

    `asking` is the row for whose learning rate the file says auto, None where the file gives the rates, and `proposed` the rate around which its
    sweep is planned. Until that is measured, there is no sweep.
    """

    rows: tuple[Row, ...]
    sweep: Sweep | None
    learning_rate: float | None
    asking: Row | None = None
    proposed: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """See `Row.method`."""
        return self.rows[0].method


class Stages:
    """The stages of one grid in one output directory."""

    def __init__(self, grid: Grid, out: Path, inputs: Inputs, flags: StepFlags) -> None:
        self._grid, self._out, self._inputs, self._flags = grid, out, inputs, flags

    def methods(self) -> list[Method]:
        """The methods, with what their sweeps have measured."""
        groups, rule = self._groups(), self._grid.sweep
        if rule is None:
            return [Method(tuple(rows), None, rows[0].learning_rate) for rows in groups]
        proposed = self._proposed(groups, rule)
        planned = [_around(rows[0], proposed.get(rows[0].method)) if rows[0].is_auto else rows for rows in groups]
        # All rows in one plan: the rank of a shared basis depends on all of them.
        plan = self.plan([*self._untrained(), *(row for rows in planned for row in _candidates(rows, rule))])
        found = []
        for asked, rows in zip(groups, planned, strict=True):
            method = Method(tuple(rows), None, None) if rows[0].is_auto else self._swept(tuple(rows), rule, plan)
            asking = asked[0] if asked[0].is_auto else None
            found.append(dataclasses.replace(method, asking=asking, proposed=proposed.get(method.key)))
        return found

    def _proposed(self, groups: Sequence[Sequence[Row]], rule: SweepRule) -> dict[tuple[object, ...], float]:
        """The learning rates that are proposed so far, of the methods for which one is to be."""
        if not any(rows[0].is_auto for rows in groups):
            return {}
        plan = self.plan([*self._untrained(), *(row for rows in groups for row in _candidates(rows, rule))])
        found, ledger = {}, Ledger(self._out)
        for rows in groups:
            step = plan.of_kind(rows[0].proposing(rule.seeds[0]).name, "proposal") if rows[0].is_auto else None
            rate = ledger.proposed_rate(step, plan.steps) if step is not None else None
            if rate is not None:
                found[rows[0].method] = rate
        return found

    def _groups(self) -> list[list[Row]]:
        """The rows of each method."""
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in self._grid.rows:
            if row.train is not None:
                groups.setdefault(row.method, []).append(row)
        return list(groups.values())

    def untried(self) -> list[Row]:
        """The rows of the methods of which no training, whatever its rate and seed, has got past its start."""
        groups, ledger = self._groups(), Ledger(self._out)
        sweeping, confirming = self._grid.sweep, self._grid.confirm
        runs = [
            _candidates(rows, sweeping) if sweeping else _confirming(rows[0], confirming, rows[0].learning_rate)
            for rows in groups
        ]
        plan = self.plan([*self._untrained(), *(row for own in runs for row in own)])

        def is_tried(own: Sequence[Row]) -> bool:
            steps = (plan.steps[name] for row in own for name in plan.steps_of[row.name])
            return any(step.kind in ("proposal", "train") and ledger.has_started(step) for step in steps)

        return [row for rows, own in zip(groups, runs, strict=True) if not is_tried(own) for row in rows]

    def start_again(self) -> list[str]:
        """Remove the runs that have gone past a rung of the sweep without a loss there: they were trained for other rungs, or for another stage.

        Returns a message for each.
        """
        rule, ledger, said = self._grid.sweep, Ledger(self._out), list[str]()
        if rule is None:
            return said
        methods = self.methods()
        # All rows in one plan, as for their sweeps.
        plan = self.plan([*self._untrained(), *(row for method in methods for row in _candidates(method.rows, rule))])
        for method in (method for method in methods if method.sweep is not None):
            total = total_steps(method.rows[0])
            rungs = [stop for stop in rule.steps(total) if stop < total]
            for row in (method.rows[0].at(rate, seed, "sweep") for rate in _rates(method.rows) for seed in rule.seeds):
                step = plan.of_kind(row.name, "train")
                message = ledger.start_again(step, rungs) if step is not None else None
                said += [message] if message else []
        return said

    def _swept(self, rows: tuple[Row, ...], rule: SweepRule, plan: Plan) -> Method:
        first, ledger = rows[0], Ledger(self._out)
        total = total_steps(first)

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
        return make_plan(grid, self._out, self._inputs, self._flags)

    def rows(self, methods: Sequence[Method], seeds: Mapping[tuple[object, ...], int]) -> list[Row]:
        """Every row that has run or runs next; `seeds` has the number of confirming seeds by method, for methods not to have all."""
        found = self._untrained()
        for method in methods:
            found += self._proposal_rows(method)
            found += self._sweep_rows(method)
        if all(method.learning_rate is not None or _lost(method) for method in methods):
            for method in methods:
                found += self._confirm_rows(method, seeds)
        return found

    def _untrained(self) -> list[Row]:
        return [row for row in self._grid.rows if row.train is None]

    def _proposal_rows(self, method: Method) -> list[Row]:
        if method.asking is None or self._grid.sweep is None:
            return []
        return [method.asking.proposing(self._grid.sweep.seeds[0])]

    def _sweep_rows(self, method: Method) -> list[Row]:
        if method.sweep is None or self._grid.sweep is None:
            return []
        found, total = [], total_steps(method.rows[0])
        for rate in method.sweep.rates:
            stops = [*method.sweep.losses[rate], *(step for other, step in method.sweep.pending if other == rate)]
            stop = max(stops) if stops else 0
            if stop:
                stop_at = stop if stop < total else None
                found += [method.rows[0].at(rate, seed, "sweep", stop_at) for seed in self._grid.sweep.seeds]
        return found

    def _confirm_rows(self, method: Method, seeds: Mapping[tuple[object, ...], int]) -> list[Row]:
        return _confirming(method.rows[0], self._grid.confirm, method.learning_rate, seeds.get(method.key))


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
    looks = len(grid.confirm.seeds) - MIN_SEEDS + 1 if grid.confirm is not None else None
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
        if method.proposed is not None and old is None:
            far = "; for this method such proposals were further off" if method.rows[0].mode in FAR else ""
            rates = ", ".join(map(short, state.planned))
            found.append(f"{name}: learning rate {short(method.proposed)} proposed from curvature, so {rates} are swept{far}")
        if state.added is not None and (old is None or old.added is None):
            side = "highest" if state.added > max(state.planned) else "lowest"
            found.append(f"{name}: the best learning rate is the {side} of its sweep, so {short(state.added)} is tried as well")
        if state.chosen is not None and (old is None or old.chosen is None):
            edge = ", still at the edge of its sweep" if state.at_edge else ""
            found.append(f"{name}: learning rate {short(state.chosen)} chosen{edge}")
        elif _lost(method) and (old is None or old.pending):
            found.append(f"{name}: training diverged at every learning rate that was left in its sweep")
    return found


def _candidates(rows: Sequence[Row], rule: SweepRule) -> list[Row]:
    """A row for every rate and seed that the sweep of a method may train; that of its proposal, while these are not known."""
    if rows[0].is_auto:
        return [rows[0].proposing(rule.seeds[0])]
    rates = dict.fromkeys([*_rates(rows), *_edges(_rates(rows))])
    return [rows[0].at(rate, seed, "sweep") for rate in rates for seed in rule.seeds]


def _around(row: Row, proposed: float | None) -> list[Row]:
    """The rows at the planned rates around a proposal: itself, and one step of the grid to each side. Without a proposal, the row itself."""
    if proposed is None:
        return [row]
    return [row.at(rate, row.seed, None) for rate in rates_around(proposed)]


def _confirming(first: Row, rule: ConfirmRule | None, rate: float | None, count: int | None = None) -> list[Row]:
    """A row for each of the first `count` seeds that confirm a method at the rate that was chosen; none before that."""
    if rule is None or rate is None:
        return []
    return [first.at(rate, seed, "confirm") for seed in rule.seeds[:count]]


def _rates(rows: Sequence[Row]) -> list[float]:
    return [row.learning_rate for row in rows if row.learning_rate is not None]


def _edges(rates: Sequence[float]) -> list[float]:
    """The rates by which a sweep over `rates` may be widened."""
    found = [beyond(sorted(rates), edge) for edge in (min(rates), max(rates))]
    return [rate for rate in found if rate is not None]


def total_steps(row: Row) -> int:
    """The optimizer steps of a complete run of a swept row."""
    steps: int = (row.train or {})["max_steps"]
    return steps


def _lost(method: Method) -> bool:
    """Whether every learning rate of the method diverged."""
    return method.sweep is not None and not method.sweep.pending and method.sweep.chosen is None
