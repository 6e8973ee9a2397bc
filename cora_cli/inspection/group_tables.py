"""The tables of pairs and of groups in the document of an inspection."""

from itertools import combinations

from cora_cli.inspection.groups import LEVEL, Grouping, Recovered
from cora_cli.inspection.headline import described, percent
from cora_cli.inspection.sharing_verdict import Verdict
from cora_cli.render.table import Cell, Table

MOST_PAIRS = 28
"""The most pairs that are listed one by one."""
_INTERVAL = f"Intervals ({LEVEL:.0%}) are over layers; “–”: there is only one."


def pairs_table(grouping: Grouping) -> Table:
    """What the models of each pair recover of each other; empty if there are more than MOST_PAIRS pairs."""
    together = {frozenset(pair) for group in grouping.groups if grouping.linked for pair in combinations(group, 2)}
    found = [pair for pair in combinations(grouping.order, 2) if pair in grouping.pairs]
    rows = []
    for one, other in found if len(found) <= MOST_PAIRS else ():
        both = (grouping.pairs[one, other], grouping.pairs[other, one])
        rows.append(
            (
                Cell(f"{one} – {other}"),
                *(Cell(described(each)) for each in both),
                Cell("yes" if all(each.above_chance for each in both) else "no"),
                Cell("yes" if frozenset((one, other)) in together else "no"),
            )
        )
    notes = (
        "The share of the gap between control and ceiling that the leading directions of one model's ΔW recover of another model's: of the first "
        f"model by the second one, and of the second by the first. {_INTERVAL} above chance: both lie above the chance band of the rule.",
    )
    headers = ("pair", "of the first", "of the second", "above chance", "one group")
    return Table("What the models of a pair recover of each other", headers, tuple(rows), notes)


def groups_table(verdict: Verdict) -> Table:
    """Each judged model with its group, its recovered share and the interval of that."""
    number = {name: place for place, group in enumerate(verdict.groups, 1) for name in group.models}
    rows = [
        (
            Cell(name),
            Cell(str(number[name]) if name in number else "–"),
            Cell(percent(one.share)),
            _interval(one),
            Cell("yes" if one.above_chance else "no"),
        )
        for name, one in verdict.recovered.items()
    ]
    notes = (
        "recovered: what the pooled ΔW of the other models of the group recover of the gap between control and ceiling; for a model outside all "
        f"groups (–), what the basis of the closest group recovers, or, if there is no group, that of the other models. {_INTERVAL}",
    )
    return Table("Groups", ("model", "group", "recovered", "interval", "above chance"), tuple(rows), notes)


def _interval(found: Recovered) -> Cell:
    return Cell(", ".join(map(percent, found.interval))) if found.interval else Cell()
