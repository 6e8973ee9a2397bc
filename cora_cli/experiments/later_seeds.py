"""Notices seeds that a grid got after results of others existed: tests assume that their number was fixed beforehand."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.records import PLAN, read_run, read_sealed
from cora_cli.rundir import RunDirectory

_Seeds = dict[tuple[Any, ...], dict[int, list[str]]]


def seeds_before(out: Path, plan: Mapping[str, Any]) -> list[int]:
    """The numbers of seeds for which the grid in `out` had results each time it was planned for more, the last time with `plan`.

    `plan` is what is to replace `plan.json`. A grid with `confirm` plans the most seeds that it may take, and looks at them one by one by rule.
    """
    try:
        old = read_sealed(out / PLAN)
    except CoraError:  # there is none, or a damaged one, which is written again
        return []
    found = [count for count in old.get("seeds_before", ()) if isinstance(count, int)]
    with contextlib.suppress(KeyError, TypeError):  # a plan of another version
        if more := _before_looks(out, old, plan) if plan.get("looks") else _before_rows(out, old, plan):
            found.append(more)
    return found


def _before_looks(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> int | None:
    if old.get("looks"):
        return _most_finished(out, _seeds(old, "confirm").values()) if new["looks"] > old["looks"] else None
    # The rates of a grid that begins to confirm are those that its sweeps will choose.
    confirming: dict[tuple[Any, ...], set[int]] = {}
    for method, seeds in _seeds(new, "confirm").items():
        confirming.setdefault(method[:-1], set()).update(seeds)
    before = _seeds(old, None).items()
    return _most_finished(out, (seeds for method, seeds in before if confirming.get(method[:-1], set()) - seeds.keys()))


def _before_rows(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> int | None:
    before, after = _seeds(old, None), _seeds(new, None)
    extended = [method for method in before.keys() & after.keys() if after[method].keys() - before[method].keys()]
    return _most_finished(out, (before[method] for method in extended))


def _seeds(plan: Mapping[str, Any], stage: str | None) -> _Seeds:
    """The runs of each seed of each method, whose learning rate comes last, in a stage of a plan; an ensemble has several for one seed."""
    found: _Seeds = {}
    for row in plan["rows"]:
        method = tuple(row[name] for name in ("group", "label", "rank", "n_models", "learning_rate"))
        runs = row.get("members") or ([row["run"]] if row["run"] is not None else [])
        if runs and row.get("stage") == stage:
            found.setdefault(method, {})[row["seed"]] = runs
    return found


def _most_finished(out: Path, methods: Iterable[Mapping[int, Sequence[str]]]) -> int | None:
    """The largest number of seeds that have finished in one method; None for none."""
    counts = (sum(all(_is_finished(out, run) for run in runs) for runs in seeds.values()) for seeds in methods)
    return max(counts, default=0) or None


def _is_finished(out: Path, run: str) -> bool:
    with contextlib.suppress(CoraError):
        return bool(read_run(RunDirectory(out / run))["status"] == "finished")
    return False
