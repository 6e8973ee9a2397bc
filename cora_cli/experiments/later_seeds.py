"""Notices seeds that a grid got after results of others existed: tests assume that their number was fixed beforehand."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cora_cli.errors import CoraError
from cora_cli.experiments.stage_rules import MIN_SEEDS
from cora_cli.records import PLAN, read_run, read_sealed
from cora_cli.rundir import RunDirectory

_Seeds = dict[tuple[Any, ...], dict[int, str | None]]


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
        if more := _before_looks(out, old, plan) if plan.get("looks") and old.get("looks") else _before_rows(out, old, plan):
            found.append(more)
    return found


def _before_looks(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> int | None:
    if new["looks"] <= old["looks"]:
        return None
    confirmed = any(row["stage"] == "confirm" and _is_finished(out, row["run"]) for row in old["rows"])
    return old["looks"] + MIN_SEEDS - 1 if confirmed else None


def _before_rows(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> int | None:
    before, after = _seeds(old), _seeds(new)
    extended = [method for method in before.keys() & after.keys() if after[method].keys() - before[method].keys()]
    return max((sum(_is_finished(out, run) for run in before[method].values()) for method in extended), default=0) or None


def _seeds(plan: Mapping[str, Any]) -> _Seeds:
    """The run of each seed of each method in a plan, of an average the last of its members."""
    found: _Seeds = {}
    for row in plan["rows"]:
        method = tuple(row[name] for name in ("group", "label", "rank", "n_models", "learning_rate"))
        run = [row["run"], *row.get("members", ())][-1]
        if run is not None and row.get("stage") is None:
            found.setdefault(method, {})[row["seed"]] = run
    return found


def _is_finished(out: Path, run: str | None) -> bool:
    with contextlib.suppress(CoraError):
        return run is not None and bool(read_run(RunDirectory(out / run))["status"] == "finished")
    return False
