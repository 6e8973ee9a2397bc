"""Chooses a learning rate by successive halving: rates that lose on the validation loss are dropped before their training ends.

Everything is a function of the losses that were measured, so an interrupted sweep makes the same decisions again. `stages` runs it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

LossAt = Callable[[float, int], float | None]
"""The validation loss of a learning rate at an optimizer step: the mean over the seeds, infinite where training diverged, None while
it is not measured."""


LEAST = 2
"""The rates that are kept until the last rung. Of two neighbouring rates, the one that wins at the end often trails until the schedule has decayed:
`benchmarks/halving.py` counts how often."""


@dataclasses.dataclass(frozen=True)
class SweepRule:
    """How a grid sweeps: the seeds, the steps at which rates are dropped, and whether a best rate at the edge adds one more rate.

    At each rung the worse half of the rates is dropped, except those within `slack` (a share of the best loss) of the best one. Before the last
    rung at least `LEAST` rates are kept.
    """

    seeds: tuple[int, ...]
    rungs: tuple[int, ...] | None = None
    slack: float = 0.02
    widen: bool = True

    def steps(self, total: int) -> tuple[int, ...]:
        """The rungs of a run of `total` steps; by default a quarter, a half and all of it."""
        return self.rungs or tuple(sorted({max(1, total // 4), max(1, total // 2), total}))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The state of one method's sweep.

    `losses` has the measured losses by rate and step, `dropped` the step at which a rate was dropped. `pending` lists the (rate, step)
    that must be measured next; when it is empty, `chosen` is the best rate, or None if all diverged. `added` is the rate beyond the edge.
    """

    planned: tuple[float, ...]
    losses: dict[float, dict[int, float]]
    dropped: dict[float, int]
    pending: tuple[tuple[float, int], ...]
    chosen: float | None
    added: float | None

    @property
    def rates(self) -> tuple[float, ...]:
        """Every rate that was tried, from the lowest on."""
        return tuple(sorted(self.losses))

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the lowest or the highest one that was tried."""
        return len(self.losses) > 1 and self.chosen in (self.rates[0], self.rates[-1])


def sweep(planned: Sequence[float], total: int, rule: SweepRule, loss: LossAt) -> Sweep:
    """The state of a sweep over the `planned` rates of runs of `total` steps."""
    rates = tuple(sorted(planned))
    losses: dict[float, dict[int, float]] = {rate: {} for rate in rates}
    dropped: dict[float, int] = {}
    alive = list(rates)
    rungs, last = rule.steps(total), 0
    for last in rungs:
        known = {rate: value for rate in alive if (value := loss(rate, last)) is not None}
        for rate, measured in known.items():
            losses[rate][last] = measured
        if len(known) < len(alive):
            pending = tuple((rate, last) for rate in alive if rate not in known)
            return Sweep(rates, losses, dropped, pending, None, None)
        alive = survivors(known, rule.slack, 1 if last == rungs[-1] else LEAST)
        dropped |= {rate: last for rate in known if rate not in alive}
        # One planned rate is no sweep. One that alone did not diverge goes on to the end, where another may be added.
        if not alive or len(rates) == 1:
            break
    chosen = min(alive, key=lambda rate: losses[rate][last]) if alive else None
    added = beyond(rates, chosen) if rule.widen else None
    if chosen is None or added is None:
        return Sweep(rates, losses, dropped, (), chosen, None)
    value = loss(added, last)
    if value is None:
        return Sweep(rates, {**losses, added: {}}, dropped, ((added, last),), None, added)
    losses[added] = {last: value}
    better = added if value < losses[chosen][last] else chosen
    return Sweep(rates, losses, dropped, (), better, added)


def survivors(losses: Mapping[float, float], slack: float, least: int = LEAST) -> list[float]:
    """The rates that go on: the better half, `least` at the least, and all within `slack` of the best; none that diverged."""
    finite = sorted((value, rate) for rate, value in losses.items() if math.isfinite(value))
    if not finite:
        return []
    half = max(least, math.ceil(len(losses) / 2))
    limit = finite[0][0] + slack * abs(finite[0][0])
    return sorted(rate for place, (value, rate) in enumerate(finite) if place < half or value <= limit)


def beyond(rates: Sequence[float], chosen: float | None) -> float | None:
    """The next rate beyond the edge at which `chosen` is, in the same ratio as its neighbour; None if it is inside."""
    if chosen is None or len(rates) < 2 or chosen not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if chosen == rates[0] else rates[-2]
    return float(f"{chosen * chosen / neighbour:.3g}")
