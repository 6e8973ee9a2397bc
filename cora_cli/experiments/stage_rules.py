"""Reads and checks the sections `sweep` and `confirm` of a grid file."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cora_cli.experiments.rows import Row
from cora_cli.experiments.sweep import SweepRule
from cora_cli.experiments.values import Values, typed

MIN_SEEDS = 3
"""The fewest seeds on each side with which anything is decided; `docs/verdict.md` has the measurement."""


@dataclasses.dataclass(frozen=True)
class ConfirmRule:
    """How a grid confirms: the most seeds of a method, in order, and the measures whose verdicts end a comparison."""

    seeds: tuple[int, ...]
    measures: tuple[str, ...]


def read_sweep(values: object, problems: list[str]) -> SweepRule | None:
    """The section `sweep`; None without one. Adds a sentence to `problems` for each fault."""
    if values is None:
        return None
    lists = _lists(values, ("seeds", "rungs"), "sweep", problems)
    rest = {key: value for key, value in values.items() if key not in lists} if isinstance(values, dict) else values
    others = typed(rest, {"slack": float, "widen": bool, "seeds": list, "rungs": list}, "sweep", problems)
    seeds, rungs = lists.get("seeds", ()), lists.get("rungs")
    if isinstance(values, dict) and len(seeds) not in (1, 2):
        problems.append(f"sweep: seeds must be one or two integers, not {values.get('seeds')!r}")
    if rungs is not None and (not rungs or rungs[0] < 1 or list(rungs) != sorted(set(rungs))):
        problems.append(f"sweep: rungs must be steps in rising order, each at least 1, not {list(rungs)}")
    if not 0 <= others.get("slack", 0.0) < 1:
        problems.append(f"sweep: slack must be at least 0 and below 1, not {others['slack']:g}")
    return SweepRule(**{**others, "seeds": seeds, "rungs": rungs})


def read_confirm(values: object, known: Collection[str], problems: list[str]) -> ConfirmRule | None:
    """The section `confirm`, whose measures are among the `known`; None without one."""
    if values is None:
        return None
    lists = _lists(values, ("seeds",), "confirm", problems)
    rest = {key: value for key, value in values.items() if key not in lists} if isinstance(values, dict) else values
    others = typed(rest, {"measures": tuple[str, ...], "seeds": list}, "confirm", problems)
    seeds, measures = lists.get("seeds", ()), others.get("measures", ("heldout_loss",))
    if isinstance(values, dict) and len(seeds) < MIN_SEEDS:
        problems.append(f"confirm: seeds must be at least {MIN_SEEDS} integers, not {values.get('seeds')!r}")
    problems += [f"confirm: measures must be among {', '.join(known)}, not {name!r}" for name in measures if name not in known]
    return ConfirmRule(seeds, measures)


def _lists(values: object, names: Collection[str], where: str, problems: list[str]) -> dict[str, tuple[int, ...]]:
    """The lists of different integers among `names`."""
    found = {}
    for name in names:
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(value, list) and all(type(entry) is int for entry in value):
            if len(set(value)) < len(value) or any(entry < 0 for entry in value):
                problems.append(f"{where}: {name} must be different integers of at least 0, not {value}")
            found[name] = tuple(value)
    return found


def stage_problems(
    rows: Sequence[Row], sweep: SweepRule | None, confirm: ConfirmRule | None, train: Values, generates: bool, blocks: object
) -> list[str]:
    """Sentences on rows that cannot be swept or confirmed; `generates` says whether their answers are scored."""
    if sweep is None and (auto := next((row for row in rows if row.is_auto), None)) is not None:
        return [
            f"{auto.label}: learning_rate auto needs a section sweep, which starts around the proposal; add one, or give numbers"
        ]
    if sweep is None and confirm is None:
        return []
    trained = [row for row in rows if row.train is not None]
    found = _auto_problems(trained)
    if sweep is not None and confirm is None:
        found.append("sweep needs a section confirm, with the seeds of the runs at the chosen learning rates")
    if sweep is not None and confirm is not None and (shared := sorted({*sweep.seeds} & {*confirm.seeds})):
        found.append(f"confirm: its seeds must be fresh, but seed {shared[0]} is also in sweep")
    if any("seed" in part for part in _parts(blocks)) or "seed" in train:
        found.append("leave seed out of the grid's blocks and of defaults: train; the seeds are those of sweep and confirm")
    if confirm is not None and not generates:
        scores = [name for name in confirm.measures if name != "heldout_loss"]
        found += [f"confirm: {name} is not measured, since evaluate is false" for name in scores]
    if confirm is not None and sweep is None:
        rates: dict[tuple[object, ...], set[float | None]] = {}
        for row in trained:
            rates.setdefault(row.method, set()).add(row.learning_rate)
        several = [row for row in trained if len(rates[row.method]) > 1]
        if several:
            found.append(f"{several[0].label} has several learning rates; add a section sweep, or choose one")
    if sweep is not None:
        found += _sweep_problems(trained, sweep, train)
    return found


def _auto_problems(trained: Sequence[Row]) -> list[str]:
    """A sentence for each method whose learning rate is to be proposed and given as well."""
    autos = {row.method: row.label for row in trained if row.is_auto}
    both = sorted({autos[row.method] for row in trained if not row.is_auto and row.method in autos})
    return [f"{label}: learning_rate auto stands alone; leave out the numbers, or auto" for label in both]


def _parts(blocks: object) -> list[Mapping[str, Any]]:
    listed = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
    inner = [row for block in listed if isinstance(block.get("rows"), list) for row in block["rows"] if isinstance(row, dict)]
    return [*listed, *inner]


def _sweep_problems(trained: Sequence[Row], sweep: SweepRule, train: Values) -> list[str]:
    found = []
    if not train.get("validation_size"):
        found.append("sweep needs validation_size in defaults: train, since the validation loss chooses the learning rate")
    totals = {row.name: (row.train or {}).get("max_steps") for row in trained}
    if lacking := [name for name, total in totals.items() if total is None]:
        found.append(f"sweep needs max_steps, which the row {lacking[0]} does not have")
    if sweep.rungs:
        found += [
            f"sweep: the rung at step {sweep.rungs[-1]} is beyond the {total} steps of the row {name}"
            for name, total in totals.items()
            if total is not None and sweep.rungs[-1] > total
        ][:1]
    return found
