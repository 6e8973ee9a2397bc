"""The tables of a report on generated programs: what became of them when they ran, and proxies of their readability."""

from collections.abc import Mapping
from typing import Any

from cora_cli.evaluation.metrics import PASS_AT
from cora_cli.evaluation.readability import PROXIES
from cora_cli.render.table import Cell, Table, number
from cora_cli.reporting.report_rows import clean
from cora_cli.reporting.summary import Group


def program_tables(group: Group) -> list[Table]:
    """The fates of the programs of each run of a group, and proxies of their readability; each table only if a run has such numbers."""
    differing = _with(group, "same_process")
    return [*_fates(_with(group, "fates"), differing, group.name), *_proxies(_with(group, "readability_proxies"), group.name)]


def _with(group: Group, what: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What `metrics.json` counts under a name, with the title of each run of the main table; several seeds are told apart."""
    found = []
    for line in group.chosen:
        for result in line.method.results:
            seed = f", seed {result.row.seed}" if len(line.method.results) > 1 else ""
            if what in result.counts:
                found.append((f"{line.title}{seed}", result.counts[what]))
    return found


def _fates(
    rows: list[tuple[str, Mapping[str, Any]]], differing: list[tuple[str, Mapping[str, Any]]], group: str
) -> list[Table]:
    fates = dict.fromkeys(fate for _, counted in rows for fate in counted)
    cells = tuple(
        (Cell(name), Cell(str(sum(counted.values()))), *(Cell(str(counted.get(fate, 0))) for fate in fates))
        for name, counted in rows
    )
    note = "Numbers of programs, over all samples. passed: all tests held."
    notes = (note, *(said for name, found in differing if (said := _otherwise(name, found))))
    return [Table(f"{group} – fates of the programs", ("row", "programs", *map(clean, fates)), cells, notes)] if rows else []


def _otherwise(name: str, found: Mapping[str, Any]) -> str:
    """What one process would say of the programs of a row, if that is something else."""
    if not found["only_together"] and not found["only_apart"]:
        return ""
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in found.items() if metric in PASS_AT)
    return (
        f"{name}: {found['only_together']} programs pass only in one process with their tests and {found['only_apart']} only apart from them; in "
        f"one process: {scores}."
    )


def _proxies(rows: list[tuple[str, Mapping[str, Any]]], group: str) -> list[Table]:
    names = [name for name in PROXIES if any(name in counted for _, counted in rows)]
    cells = tuple((Cell(row), *(_proxy(counted.get(name)) for name in names)) for row, counted in rows)
    explained = "; ".join(f"{_header(name)}: {PROXIES[name]}" for name in names)
    records = sorted({entry["n"] for _, counted in rows for entry in counted.values()})
    range_of = " to ".join(map(str, dict.fromkeys(records[:1] + records[-1:])))
    note = (
        "Proxies, counted in the text of the programs without running them: none of them is readability. Value [95 % interval over records], "
        f"n = {range_of} records that have anything to count. {explained}."
    )
    return [Table(f"{group} – proxies of readability", ("row", *map(_header, names)), cells, (note,))] if names else []


def _header(name: str) -> str:
    return name.replace("_", " ")


def _proxy(entry: Mapping[str, Any] | None) -> Cell:
    return Cell() if entry is None else number(entry["value"], entry["ci95"], 2)
