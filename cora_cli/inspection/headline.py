"""The headline of the verdict in words: who shares a subspace with whom, and how much of it.

`sharing_verdict` decides; nothing is decided here.
"""

from collections.abc import Mapping, Sequence

from cora_cli.inspection.groups import LINK, Group, Grouping, Recovered, unlinked

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def headline_of(
    shares: Mapping[str, Recovered], groups: Sequence[Group], outside: Sequence[str], between: float | None, some_unjudged: bool
) -> str:
    """The first sentence of the verdict on the judged models, whose recovered shares are `shares`; the others as in `Verdict`."""
    others = "the other models recover" if len(shares) > 2 else "the other model recovers"
    gap = "of the gap between control and ceiling"
    if not groups:
        inside = [name for name, one in shares.items() if not one.above_chance]
        band = f" Inside the chance band: {_listed(inside)}." if inside else ""
        return f"No shared subspace found: {others} {_range(shares)} {gap}.{band}"
    left = _outside(shares, outside, len(groups))
    if len(groups) > 1:
        said = "; ".join(f"{_listed(one.models)} ({_strength(one)}, {_range(one.recovered, named=False)})" for one in groups)
        cross = f" One group recovers at most {percent(between)} of a model of another one." if between is not None else ""
        return f"{_number(len(groups)).capitalize()} groups: {said}. The shares are what the others of the group recover {gap}.{cross}{left}"
    [group] = groups
    if not outside:
        return f"{_strength(group).capitalize()}: {others} {_range(group.recovered)} {gap}."
    all_of = f"{_number(len(shares))}{' judged' if some_unjudged else ''} models"
    common = f"{'Partly common' if group.partly else 'Common'} to {_number(len(group.models))} of {all_of}"
    rest = "the others of them recover" if len(group.models) > 2 else "the other of them recovers"
    return f"{common} ({_listed(group.models)}): {rest} {_range(group.recovered)} {gap}.{left}"


def loose_pairs(grouping: Grouping, group: Sequence[str]) -> str | None:
    """Which two models of `group` are the least related, if they are in it only through the others."""
    found = unlinked(grouping, group)
    if not found:
        return None
    one, other = found[0]
    known = [grouping.pairs[way] for way in ((one, other), (other, one)) if way in grouping.pairs]
    least = (
        f"recovers at least {described(min(known, key=lambda each: each.share))} of the other"
        if known
        else "changed what the other did not"
    )
    return (
        f"Not every pair of {_listed(group)} is related by itself ({len(found)} of {len(group) * (len(group) - 1) // 2} pairs are below {LINK:.0%} or "
        f"inside the chance band). The least related are {one} and {other}: each {least}. They are in one group through the other models."
    )


def _outside(shares: Mapping[str, Recovered], outside: Sequence[str], groups: int) -> str:
    if not outside:
        return ""
    basis = "the group's basis" if groups == 1 else "the closest group's basis"
    return " Outside: " + ", ".join(f"{name} ({basis} recovers {described(shares[name])})" for name in outside) + "."


def _strength(group: Group) -> str:
    return "partly shared" if group.partly else "shared"


def _range(shares: Mapping[str, Recovered], named: bool = True) -> str:
    """The lowest share, with its model if `named`, to the highest one."""
    ordered = sorted(shares, key=lambda name: shares[name].share)
    low, high = ordered[0], ordered[-1]
    return f"{described(shares[low])}{f' (for {low})' if named else ''} to {described(shares[high])}"


def described(found: Recovered) -> str:
    """A recovered share with its interval, as in “92.0% [90.1%, 93.4%]”; “[–]” if it has none."""
    ends = ", ".join(map(percent, found.interval)) if found.interval else "–"
    return f"{percent(found.share)} [{ends}]"


def _number(count: int) -> str:
    return _WORDS[count] if count < len(_WORDS) else str(count)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def percent(share: float) -> str:
    """A share (0-1) in percent with one decimal."""
    return f"{round(share, 3) + 0.0:.1%}"  # adding 0.0 turns -0.0 into 0.0
