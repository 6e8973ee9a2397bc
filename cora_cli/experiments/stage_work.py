"""Says how much work a grid with stages is: its rungs, and the most and the likely number of runs with their time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from cora_cli.experiments.estimate import Estimate
from cora_cli.experiments.grid import Grid
from cora_cli.experiments.rows import Row
from cora_cli.experiments.screen import duration
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.experiments.stages import Method, total_steps
from cora_cli.experiments.steps import Kind, Plan
from cora_cli.experiments.sweep import LEAST
from cora_cli.training.proposal import rates_around


def stage_lines(grid: Grid, methods: Sequence[Method], plan: Plan, estimates: Mapping[str, Estimate]) -> list[str]:
    """The rungs, and the most and the likely number of runs with their time; `plan` has one complete run of each method."""
    confirm = grid.confirm
    assert confirm is not None
    lines = []
    most, likely = _Work(), _Work()
    if asking := sum(method.asking is not None and method.proposed is None for method in methods):
        of = f"{asking} methods" if asking > 1 else "1 method"
        lines.append(
            f"first, a learning rate is proposed from curvature for {of}; their sweeps start with three rates around it"
        )
    middle = math.ceil((MIN_SEEDS + len(confirm.seeds)) / 2)
    for method in methods:
        row = method.rows[0]
        training, *after = (_seconds(plan, estimates, row, kind) for kind in _EACH_RUN)
        members = row.ensemble or 1
        known = [seconds for seconds in after if seconds is not None]
        complete = None if training is None or len(known) < len(after) else training + sum(known) / members
        if grid.sweep is not None:
            total, count = total_steps(method.rows[0]), len(grid.sweep.seeds)
            rungs = grid.sweep.steps(total)
            rates = len(rates_around(1.0)) if method.asking is not None else len(method.rows)
            # One rate is only trained to the first rung. Of two, the better one is always at an edge.
            last = rungs[0 if rates == 1 else -1] / total
            most.add(count * (rates + (grid.sweep.widen and rates > 1)), last, training)
            likely.add(count * rates, last if rates == 1 else _likely_share(rates, rungs, total), training)
            likely.add(count * (grid.sweep.widen and rates == 2), last, training)
        most.add(len(confirm.seeds) * members, 1, complete)
        likely.add(middle * members, 1, complete)
    if grid.sweep is not None:
        totals = sorted({total_steps(method.rows[0]) for method in methods})
        shown = "; ".join(dict.fromkeys(_rung_words(grid.sweep.steps(total), total) for total in totals))
        lines.append(f"sweep: {shown} (seeds {_listed(grid.sweep.seeds)})")
    lines.append(
        f"confirm: {MIN_SEEDS} to {len(confirm.seeds)} seeds of each method ({_listed(confirm.seeds)}), until its verdict on "
        f"{', '.join(confirm.measures)} is not undecided"
    )
    lines.append(
        f"at most {most.runs} training runs, {most.time()}; likely {likely.runs}, {likely.time()}, if every rung drops what it may, no sweep of "
        f"more than two rates is widened and {middle} seeds decide"
    )
    return lines


_EACH_RUN: tuple[Kind, ...] = ("train", "laplace", "evaluate")


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


def _rung_words(rungs: Sequence[int], total: int) -> str:
    """What happens at each rung of a run of `total` steps."""
    *early, last = rungs
    dropping = (
        f"at step {_listed(early)} the worse half of the learning rates is dropped, down to {LEAST}, and " if early else ""
    )
    return f"{dropping}the best one is chosen at step {last} of {total}"


def _likely_share(rates: int, rungs: Sequence[int], total: int) -> float:
    """The share of a complete run that each of these rates gets on average if every rung drops half of them."""
    steps, left, before = 0, rates, 0
    for rung in rungs:
        steps += left * (rung - before)
        left, before = max(min(left, LEAST), math.ceil(left / 2)), rung
    return steps / total / rates


def _seconds(plan: Plan, estimates: Mapping[str, Estimate], row: Row, kind: Kind) -> float | None:
    """The estimated time of a row's step; 0 if it has no such step, None if it is unknown."""
    step = plan.of_kind(row.name, kind)
    if step is None:
        return 0.0
    return estimates[step.name].seconds if step.name in estimates else None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
